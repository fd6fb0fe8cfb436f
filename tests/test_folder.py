"""Image files where they are: layouts, splits, labels, what is left out, what changed."""

import logging
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mae_dist.data import Dataset, open_split
from mae_dist.data.sources import listing
from mae_dist.errors import ConfigError, DataFault

RNG = np.random.default_rng(0)


def write(*paths: Path, shape: tuple[int, ...] = (12, 10, 3), dtype: Any = np.uint8) -> None:
    """Writes an image of noise to each path."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        image = RNG.integers(0, np.iinfo(dtype).max, shape, dtype=dtype)
        if path.suffix == ".npy":
            np.save(path, image)
        else:
            path.write_bytes(cv2.imencode(path.suffix.lower(), image)[1].tobytes())


def opened(data_dir: Any, split: str = "all", *, channels: int = 3, cache: str = "auto", **fields: Any) -> Dataset:
    place = Path(str(data_dir).partition(",")[0].partition("*")[0])
    cache_dir = str(place.parent / "cache")
    options = {"cache_dir": cache_dir, "max_bad_share": 0.0, "image_size": (8, 8), "val_fraction": 0.2, **fields}
    return open_split(split, source="folder", data_dir=str(data_dir), channels=channels, cache=cache, **options)


def names(dataset: Dataset) -> set[str]:
    return {dataset.file_name(index) for index in range(dataset.num_examples)}


LAYOUTS = {
    "flat": [f"{i}.png" for i in range(20)],
    "train without classes": [f"train/{i}.png" for i in range(20)],
    "three levels deep": [f"a/{i % 3}/b/{i}.JPG" for i in range(20)],
    "classes without train": [f"{'cat' if i % 2 else 'dog'}/{i}.png" for i in range(20)],
    "classes and splits": [
        f"{split}/{'cat' if i % 2 else 'dog'}/{i}.png" for i in range(10) for split in ("train", "val")
    ],
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_layout_is_read_where_it_is(tmp_path: Path, layout: str) -> None:
    """Without labels, nothing copied; train and val share all files and no file is in both."""
    root = tmp_path / "images"
    write(*(root / name for name in LAYOUTS[layout]))
    before = sorted(os.walk(root))
    train, val = opened(root, "train"), opened(root, "val")
    assert names(train) | names(val) == set(LAYOUTS[layout])
    assert not names(train) & names(val)
    assert val.num_examples > 0
    assert train.num_classes == 0
    columns = train.examples(np.arange(train.num_examples))
    assert columns["image"].shape[1:] == (8, 8, 3)
    assert (columns["label"] == -1).all()
    assert sorted(os.walk(root)) == before
    with pytest.raises(ConfigError, match=r"no labels.*data\.labels='folders'"):
        train.require_labels()


def test_what_is_passed_over_is_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "images"
    write(*(root / "train" / name / f"{i}.png" for name in ("cat", "dog") for i in range(4)))
    junk = ("train/.ipynb_checkpoints/1.png", "__MACOSX/._1.png", "train/cat/@eaDir/1.png", "train/cat/._2.png")
    write(*(root / name for name in junk))
    (root / "train" / "empty").mkdir()
    (root / "train" / "dog" / "Thumbs.db").write_bytes(b"x")
    (root / "train" / "notes.txt").write_text("x")
    (root / "train" / "dog" / "gone.png").symlink_to("nowhere.png")
    with caplog.at_level(logging.WARNING):
        dataset = opened(root, "train", labels="folders")
    assert dataset.class_names == ("cat", "dog")
    assert dataset.num_examples + opened(root, "val", labels="folders").num_examples == 8
    assert "left out 7 files and directories" in caplog.text
    for named in (".ipynb_checkpoints", "__MACOSX", "@eaDir", "Thumbs.db", "notes.txt", "gone.png (broken links)"):
        assert named in caplog.text


def test_loose_images_beside_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With labels they are named as left out; without labels they are used."""
    write(*(tmp_path / "images" / name for name in ("cat/1.png", "dog/2.png", "cat/3.png", "loose.png")))
    assert opened(tmp_path / "images").num_examples == 4
    assert opened(tmp_path / "images", labels="folders").num_examples == 3
    assert "loose.png (outside the directories of the classes)" in caplog.text


def test_names_of_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """valid/ is val; a flat test/ has no classes; what is beside the splits is named; a class may be called train."""
    root = tmp_path / "images"
    write(*(root / name for name in ("train/a/1.png", "train/b/2.png", "Valid/a/3.png", "test/4.png", "extra/5.png")))
    assert names(opened(root, "val")) == names(opened(root, "validation")) == {"Valid/a/3.png"}
    assert names(opened(root, "test")) == {"test/4.png"}
    assert "extra/5.png (beside the directories of the splits)" in caplog.text
    with pytest.raises(ConfigError, match="'test' selects no example"):
        opened(root, "test", labels="folders")
    assert "test/4.png (outside the directories of the classes)" in caplog.text
    write(tmp_path / "vehicles" / "train" / "1.png", tmp_path / "vehicles" / "bus" / "2.png")
    assert opened(tmp_path / "vehicles", labels="folders", val_fraction=0.0).class_names == ("bus", "train")
    write(root / "test" / "c" / "6.png")
    with pytest.raises(DataFault, match=r"the classes \['c'\] of val/ or test/"):
        opened(root, "test", labels="folders")


def test_links_are_followed_once(tmp_path: Path) -> None:
    root = tmp_path / "images"
    write(root / "real" / "1.png", tmp_path / "elsewhere" / "2.png")
    (root / "again").symlink_to(root / "real")
    (root / "real" / "loop").symlink_to(root)
    (root / "other").symlink_to(tmp_path / "elsewhere")
    (root / "file.png").symlink_to(root / "real" / "1.png")
    assert names(opened(root)) == {"real/1.png", "other/2.png", "file.png"}


def test_names_of_any_bytes(tmp_path: Path) -> None:
    root = tmp_path / "images"
    write(root / "a b, c.png")
    shutil.copy(root / "a b, c.png", os.fsdecode(os.path.join(os.fsencode(root), b"\xff\n.png")))
    dataset = opened(root)
    assert names(dataset) == {"a b, c.png", "\\xff\n.png"}
    assert dataset.examples(np.arange(2))["image"].any()


def test_several_directories_a_list_and_a_glob(tmp_path: Path) -> None:
    write(*(tmp_path / name for name in ("a/1.png", "b/x/2.png", "c/3.png")))
    assert names(opened(f"{tmp_path}/a,{tmp_path}/b")) == {"a/1.png", "b/x/2.png"}
    (tmp_path / "list.txt").write_text(f"a/1.png\n{tmp_path}/c/3.png\n\n")
    assert names(opened(tmp_path / "list.txt")) == {"a/1.png", "c/3.png"}
    assert names(opened(f"{tmp_path}/*/*.png")) == {"a/1.png", "c/3.png"}
    (tmp_path / "list.txt").write_text("a/1.png\nb/0.png\n")
    with pytest.raises(DataFault, match=r"b/0\.png.*does not exist"):
        opened(tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("data_dir", "error", "message"),
    [
        ("", ConfigError, "name the directory of the images"),
        ("nowhere", DataFault, "does not exist"),
        ("gs://bucket/images", ConfigError, "read from a disk"),
        ("nowhere/*.png", ConfigError, "matches nothing"),
        (".", DataFault, r"holds no image.*1 not images by their names"),
    ],
)
def test_what_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_dir: str, error: type[Exception], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "readme.md").write_text("x")
    with pytest.raises(error, match=message):
        opened(data_dir, cache_dir=str(tmp_path / "cache"))


def test_a_file_keeps_its_split_when_others_are_added(tmp_path: Path) -> None:
    root = tmp_path / "images"
    write(*(root / f"{i}.png" for i in range(50)))
    before = {split: names(opened(root, split)) for split in ("train", "val")}
    write(*(root / f"new_{i}.png" for i in range(50)))
    for split, old in before.items():
        new = names(opened(root, split))
        assert old < new, split
    assert 0 < len(before["val"]) < 25


def test_a_table_of_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its files are used, sorted by number; an empty label is none; other files are named."""
    root = tmp_path / "images"
    write(*(root / f"{i}.png" for i in range(6)))
    table = tmp_path / "labels.csv"
    table.write_text(
        f"path,label,split\n0.png,10,train\n1.png,9,train\n{root}/2.png,,train\nsub/../3.png,10,test\n4.png,9,val\n"
    )
    train = opened(root, "train", labels=f"csv:{table}")
    assert train.class_names == ("9", "10")
    found = dict(
        zip((train.file_name(i) for i in range(3)), train.examples(np.arange(3))["label"].tolist(), strict=True)
    )
    assert found == {"0.png": 1, "1.png": 0, "2.png": -1}
    assert names(opened(root, "test", labels=f"csv:{table}")) == {"3.png"}
    assert "5.png (not in the table of labels)" in caplog.text
    train.require_labels()
    with pytest.raises(DataFault, match=r"2\.png has label -1"):
        train.examples(np.arange(3))
    for text, message in (
        ("7.png,1\n", r"names 1 files that are not images in .*7\.png \(line 1\)"),
        ("0.png,1,tset\n", "line 1: the split 'tset' is none of train, val, test"),
        ("0.png\n", "needed are lines of path,label"),
    ):
        table.write_text(text)
        with pytest.raises(DataFault, match=message):
            opened(root, labels=f"csv:{table}")
    with pytest.raises(ConfigError, match="cannot be read"):
        opened(root, labels="csv:nowhere.csv")


def test_what_changed_is_named(tmp_path: Path) -> None:
    """By names and sizes, wherever the directory is now."""
    root = tmp_path / "images"
    write(*(root / f"{i}.png" for i in range(8)))
    before = opened(root, "train")
    root = root.rename(tmp_path / "moved")
    assert opened(root, "train").fingerprint == before.fingerprint
    write(root / "new.png")
    (root / "3.png").unlink()
    write(root / "5.png", shape=(30, 30, 3))
    after = opened(root, "train")
    assert after.fingerprint != before.fingerprint
    assert after.changes(before.fingerprint) == "1 added: new.png; 1 gone: 3.png; 1 of another size: 5.png"
    shutil.rmtree(tmp_path / "cache")
    assert after.changes(before.fingerprint) == ""


def test_only_a_few_listings_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_KEPT", 2)
    for i in range(4):
        write(tmp_path / "images" / f"{i}.png")
        opened(tmp_path / "images")
    assert len(list((tmp_path / "cache" / "listings").iterdir())) == 2


@pytest.mark.parametrize(
    ("suffix", "shape", "dtype", "channels"),
    [(".png", (12, 10), np.uint16, 1), (".npy", (12, 10, 6), np.uint8, 6), (".npy", (13, 12, 10), np.uint16, 13)],
)
def test_deep_images_and_bands(tmp_path: Path, suffix: str, shape: tuple[int, ...], dtype: Any, channels: int) -> None:
    """They keep their type, also in worker processes, which get a pickled copy."""
    write(*(tmp_path / "images" / f"{i}{suffix}" for i in range(4)), shape=shape, dtype=dtype)
    dataset = pickle.loads(pickle.dumps(opened(tmp_path / "images", channels=channels)))
    image = dataset.examples(np.arange(4))["image"]
    assert str(image.dtype) == dataset.dtype == np.dtype(dtype).name
    assert image.shape == (4, 8, 8, channels)
    kept = opened(tmp_path / "images", channels=channels, cache="memory", image_size=(12, 10))
    again = opened(tmp_path / "images", channels=channels, cache="memory", image_size=(12, 10))
    assert kept.examples(np.arange(4))["image"].dtype == again.examples(np.arange(4))["image"].dtype == dtype


def test_channels_that_no_file_has(tmp_path: Path) -> None:
    write(*(tmp_path / "images" / f"{i}.npy" for i in range(4)), shape=(12, 10, 6))
    with pytest.raises(DataFault, match=r"of 4 files in .* none decodes; .*6 channels where 3 are asked for"):
        opened(tmp_path / "images")


def test_broken_files_are_named_with_the_reason(tmp_path: Path) -> None:
    root = tmp_path / "images"
    write(*(root / f"{i}.png" for i in range(6)))
    (root / "empty.png").write_bytes(b"")
    (root / "text.jpg").write_text("no image")
    dataset = opened(root)
    _, bad = dataset.read(np.arange(8))
    assert {dataset.file_name(int(index)) for index in np.flatnonzero(bad)} == {"empty.png", "text.jpg"}
    with pytest.raises(DataFault, match=r"text\.jpg \(8 bytes starting b'no image' are not a whole image\)"):
        dataset.examples(np.arange(8))
    with pytest.raises(DataFault, match=r"empty\.png \(it is empty or gone\)"):
        dataset.examples(np.arange(8))
