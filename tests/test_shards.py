"""Images in WebDataset's tar files and in Parquet files: every one read from where it lies, labels, splits, faults."""

import io
import json
import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from mae_dist.data import Dataset, open_split
from mae_dist.data.sources import parquet as parquet_source
from mae_dist.data.sources import tar as tar_source
from mae_dist.errors import ConfigError, DataFault

SIZE = (6, 5)


def png(number: int, dtype: Any = np.uint8) -> bytes:
    return cv2.imencode(".png", np.full((*SIZE, 3), number, dtype))[1].tobytes()


def write_tar(path: Path, members: Mapping[str, bytes], mode: Literal["w", "w:gz"] = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_parquet(path: Path, numbers: range, *, struct: bool = True, group: int = 3, **columns: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": png(i), "path": f"{i}.png"} if struct else png(i) for i in numbers]
    parquet.write_table(pa.table({"image": images, **columns}), path, row_group_size=group)


def opened(source: str, data_dir: Any, split: str = "all", **fields: Any) -> Dataset:
    place = Path(str(data_dir).partition(",")[0].partition("*")[0])
    options = {"cache": "auto", "cache_dir": str(place.parent / "cache"), "max_bad_share": 0.0, **fields}
    return open_split(split, **{"image_size": SIZE, "channels": 3, **options}, source=source, data_dir=str(data_dir))


def numbers(dataset: Dataset) -> dict[int, int]:
    """Number that an image shows -> label."""
    columns = dataset.examples(np.arange(dataset.num_examples))
    shown = columns["image"].reshape(dataset.num_examples, -1)
    assert (shown == shown[:, :1]).all()
    return dict(zip(shown[:, 0].tolist(), columns["label"].tolist(), strict=True))


def test_tar_files(tmp_path: Path) -> None:
    """Keys with directories and dots, labels of both kinds, other members; in any order, from a pickled copy too."""
    root = tmp_path / "shards"
    write_tar(
        root / "a-000.tar",
        {
            "x/1.jpg.txt": b"a caption",
            "x/1.PNG": png(1),
            "x/1.cls": b"7\n",
            "2.json": json.dumps({"label": 10}).encode(),
            "2.depth.png": png(99),
            "2.png": png(2),
            "2.second.png": png(99),
            f"{'long/' * 40}3.png": png(3),
            ".hidden.png": png(99),
            "no_suffix": b"",
        },
    )
    write_tar(root / "a-001.tar", {"4.seg.png": png(4), "lonely.cls": b"7", "5.png": png(5), "5.json": b"{"})
    dataset = opened("tar", root, labels="cls")
    assert numbers(dataset) == {1: 0, 2: 1, 3: -1, 4: -1, 5: -1}
    assert dataset.class_names == ("7", "10")
    assert {dataset.file_name(i) for i in range(5)} == {
        *("a-000.tar/x/1.PNG", "a-000.tar/2.png", f"a-000.tar/{'long/' * 40}3.png"),
        *("a-001.tar/4.seg.png", "a-001.tar/5.png"),
    }
    copy = pickle.loads(pickle.dumps(dataset))
    order = np.array([3, 0, 2, 2, 1])
    np.testing.assert_array_equal(copy.examples(order)["image"], dataset.examples(np.arange(5))["image"][order])
    assert set(numbers(opened("tar", root)).values()) == {-1}
    assert opened("tar", f"{root}/*-001.tar").num_examples == 2
    assert opened("tar", f"{root}/a-000.tar,{root}/a-001.tar").num_examples == 5


def test_left_out_members_are_named_from_the_cache_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tar(tmp_path / "tars" / "a.tar", {"1.png": png(1), "1.b.png": png(2), "2.txt": b"x"})
    for _ in range(2):
        caplog.clear()
        opened("tar", tmp_path / "tars")
        assert "left out 2 files" in caplog.text
        assert "a.tar/1.b.png (a further image of the same key)" in caplog.text
        assert "a.tar/2.txt (no image of a known suffix)" in caplog.text


@pytest.mark.parametrize("source", ["tar", "parquet"])
def test_splits_by_names_of_files(tmp_path: Path, source: str) -> None:
    root = tmp_path / "data"
    for number, name in enumerate(("train-0", "validation-00000-of-00001", "test/0", "imagenet_train_1", "extra")):
        if source == "tar":
            write_tar(root / f"{name}.tar", {f"{number}.png": png(number)})
        else:
            write_parquet(root / f"{name}.parquet", range(number, number + 1))
    assert set(numbers(opened(source, root, "train"))) == {0, 3, 4}
    assert set(numbers(opened(source, root, "val"))) == {1}
    assert set(numbers(opened(source, root, "test"))) == {2}
    with pytest.raises(ConfigError, match="selects no example"):
        opened(source, root / "train-0.tar" if source == "tar" else root / "train-0.parquet", "test")


def test_keys_keep_their_split_when_shards_change(tmp_path: Path) -> None:
    members = {f"{i:03d}.png": png(i) for i in range(60)}
    write_tar(tmp_path / "one" / "0.tar", members)
    for shard in range(4):
        write_tar(tmp_path / "four" / f"{shard}.tar", dict(list(members.items())[shard::4]))
    one, four = (opened("tar", tmp_path / name, "val", val_fraction=0.3) for name in ("one", "four"))
    assert list(numbers(one)) == list(numbers(four))
    assert 5 < one.num_examples < 30
    rest = opened("tar", tmp_path / "four", "train", val_fraction=0.3)
    assert set(numbers(rest)) | set(numbers(four)) == set(range(60))
    assert not set(numbers(rest)) & set(numbers(four))


def test_tar_files_are_indexed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "tars"
    write_tar(root / "0.tar", {"1.png": png(1), "1.cls": b"3", "2.png": png(2)})
    first = opened("tar", root, labels="cls")
    with monkeypatch.context() as patch:
        patch.setattr(tar_source, "_make_index", None)
        again = opened("tar", root, labels="cls")
    assert again.fingerprint == first.fingerprint
    assert numbers(again) == numbers(first) == {1: 0, 2: -1}
    (kept,) = (tmp_path / "cache" / "tar").iterdir()
    kept.write_bytes(kept.read_bytes()[:50])
    assert numbers(opened("tar", root, labels="cls")) == numbers(first)
    write_tar(root / "1.tar", {"3.png": png(3)})
    after = opened("tar", root)
    assert set(numbers(after)) == {1, 2, 3}
    assert after.changes(first.fingerprint) == "1 added: 1.tar/3.png"


def test_tar_files_that_cannot_be_read_at_random(tmp_path: Path) -> None:
    members = {f"{i}.png": png(i) for i in range(3)}
    shard = tmp_path / "tars" / "0.tar"
    write_tar(shard, members, "w:gz")
    with pytest.raises(DataFault, match=r"0\.tar is no plain tar file, or corrupted .*uncompress it"):
        opened("tar", shard)
    write_tar(shard, members)
    whole = shard.read_bytes()
    shard.write_bytes(whole[: 512 + 40])
    with pytest.raises(DataFault, match="corrupted"):
        opened("tar", shard)
    shard.write_bytes(whole[:1024] + b"x" * 512 + whole[1536:])
    with pytest.raises(DataFault, match="is corrupted after byte 1024"):
        opened("tar", shard)
    shard.write_bytes(whole + whole)
    with pytest.raises(DataFault, match="several tar files in one"):
        opened("tar", shard)
    with tarfile.open(shard, "w") as tar:
        tar.add(shard.parent, "directory", recursive=False)
    with pytest.raises(DataFault, match="hold no image"):
        opened("tar", shard)
    write_tar(shard, {"1.txt": b"x"})
    with pytest.raises(DataFault, match=r"hold no image; left out 1 files .*1\.txt"):
        opened("tar", shard)
    write_tar(shard, members)
    with pytest.raises(DataFault, match=r"has no labels, neither \.cls nor"):
        opened("tar", shard, labels="cls")
    dataset = opened("tar", shard)
    shard.write_bytes(whole[:700])
    with pytest.raises(DataFault, match=r"0\.tar/\d\.png \(it is empty or gone\)"):
        dataset.examples(np.arange(3))


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, struct: bool) -> None:
    """In any order, from a pickled copy too, whether or not row groups are kept."""
    root = tmp_path / "data"
    write_parquet(root / "a.parquet", range(8), struct=struct, kind=[*"cbacba", None, "a"])
    write_parquet(root / "b.parquet", range(8, 10), struct=struct, kind=["c", "c"])
    dataset = opened("parquet", root, labels="column:kind")
    assert numbers(dataset) == dict(enumerate([2, 1, 0, 2, 1, 0, -1, 0, 2, 2]))
    assert dataset.class_names == ("a", "b", "c")
    assert {dataset.file_name(i) for i in range(10)} >= {"a.parquet/0", "b.parquet/1"}
    monkeypatch.setattr(parquet_source, "_KEPT_BYTES", 0)
    monkeypatch.setattr(parquet_source, "_GROUPS", parquet_source._RowGroups())
    copy = pickle.loads(pickle.dumps(dataset))
    order = np.array([9, 0, 3, 3, 1])
    np.testing.assert_array_equal(copy.examples(order)["image"], dataset.examples(np.arange(10))["image"][order])
    assert len(parquet_source._GROUPS._kept) == 1


def test_hugging_face_names_classes(tmp_path: Path) -> None:
    path = tmp_path / "data" / "train.parquet"
    write_parquet(path, range(3), label=[2, 0, None])
    table = parquet.read_table(path)
    features = {"info": {"features": {"label": {"names": ["x", "y", "z"], "_type": "ClassLabel"}}}}
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path)
    dataset = opened("parquet", path, labels="column:label")
    assert numbers(dataset) == {0: 2, 1: 0, 2: -1}
    assert dataset.class_names == ("x", "y", "z")


def test_parquet_files_that_do_not_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "data"
    write_parquet(root / "a.parquet", range(3))
    with pytest.raises(ConfigError, match=r"data\.labels='column:kind': .*a\.parquet has the columns image"):
        opened("parquet", root, labels="column:kind")
    (root / "b.parquet").write_bytes((root / "a.parquet").read_bytes()[:-20])
    with pytest.raises(DataFault, match=r"b\.parquet is no Parquet file, or corrupted"):
        opened("parquet", root)
    parquet.write_table(pa.table({"left": [b""], "right": [b""], "n": [1]}), root / "b.parquet")
    with pytest.raises(ConfigError, match="has the columns left, right, n; needed is one of bytes"):
        opened("parquet", root / "b.parquet")
    parquet.write_table(pa.table({"image": [png(1), None, b"text"]}), root / "b.parquet")
    dataset = opened("parquet", root / "b.parquet")
    assert dataset.read(np.arange(3))[1].sum() == 2
    parquet.write_table(pa.table({"image": pa.array([], pa.binary())}), root / "b.parquet")
    with pytest.raises(DataFault, match="have no rows"):
        opened("parquet", root / "b.parquet")


def test_slow_row_groups_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_parquet(tmp_path / "data" / "a.parquet", range(9))
    monkeypatch.setattr(parquet_source, "_KEPT_BYTES", 10)
    opened("parquet", tmp_path / "data")
    assert "in 3 row groups of about 3 images" in caplog.text


@pytest.mark.parametrize("source", ["tar", "parquet"])
def test_deep_images_are_found(tmp_path: Path, source: str) -> None:
    path = tmp_path / "data" / f"a.{source}"
    deep = [png(i * 1000, np.uint16) for i in range(3)]
    path.parent.mkdir()
    if source == "tar":
        write_tar(path, {f"{i}.png": data for i, data in enumerate(deep)})
    else:
        parquet.write_table(pa.table({"image": deep}), path)
    dataset = opened(source, path)
    assert dataset.dtype == "uint16"
    assert set(numbers(dataset)) == {0, 1000, 2000}
    memory = opened(source, path, cache="memory")
    assert set(numbers(memory)) == {0, 1000, 2000}
