"""TFDS data without TensorFlow: prepared sets, CIFAR from its archive, the decoded copy, and corrupted files."""

import hashlib
import io
import logging
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import constants
from tensorflow_datasets.core.download.checksums import UrlInfo
from tensorflow_datasets.core.units import Size

from mae_dist.data import (
    ArrayDataset,
    Dataset,
    DescribedDataset,
    RandAugment,
    eval_batches,
    is_prepared,
    open_split,
    train_batches,
)
from mae_dist.data.decode import Decoder
from mae_dist.data.sources import cifar
from mae_dist.data.sources.tfds import TfdsDataset
from mae_dist.errors import ConfigError, DataFault
from tests.test_resample import pillows

NAMES = ["cat", "dog", "owl"]
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"


def _jpeg(size: tuple[int, int], seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC))[1].tobytes()


def prepare_shapes(
    data_dir: Path,
    *,
    sizes: list[tuple[int, int]],
    fixed: bool,
    broken: tuple[int, ...] = (),
    labels: list[int] | None = None,
) -> Path:
    """Writes a small TFDS dataset with one example per size into "train" and half of them into "test"."""

    class Shapes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            shape = (*sizes[0], 3) if fixed else (None, None, 3)
            features = {"image": tfds.features.Image(shape=shape), "label": tfds.features.ClassLabel(names=NAMES)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
            return {"train": self._generate_examples(len(sizes)), "test": self._generate_examples(len(sizes) // 2)}

        def _generate_examples(self, count: int) -> Iterator[Any]:
            for index in range(count):
                data = _jpeg(sizes[index], index)
                if index in broken:
                    data = data[: len(data) // 2]
                # TFDS shuffles by a hash of the key: the label tells which example came out where.
                yield index, {"image": data, "label": labels[index] if labels else index % 3}

    builder = Shapes(data_dir=data_dir)
    builder.download_and_prepare(file_format="array_record")
    return Path(builder.data_path)


ARGUMENTS: dict[str, Any] = {
    "image_size": (16, 16),
    "channels": 3,
    "source": "tfds",
    "name": "shapes",
    "cache": "auto",
    "cache_dir": "",
    "stage": False,
    "max_bad_share": 0.0,
    "num_examples": 0,
    "num_classes": 0,
}


class _NoTensorFlow:
    """An import finder for a machine without TensorFlow."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        del path, target
        if name.split(".")[0] == "tensorflow":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.fixture
def no_tensorflow(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "tensorflow" not in sys.modules
    monkeypatch.setattr(sys, "meta_path", [_NoTensorFlow(), *sys.meta_path])


def _open(where: Path, split: str = "train", **changes: Any) -> Dataset:
    here: dict[str, Any] = {"data_dir": str(where), "cache_dir": str(where / "cache")}
    return open_split(split, **(ARGUMENTS | here | changes))


@pytest.fixture
def fixed(tmp_path: Path) -> Path:
    prepare_shapes(tmp_path, sizes=[(16, 16)] * 12, fixed=True)
    return tmp_path


@pytest.fixture
def varied(tmp_path: Path) -> Path:
    prepare_shapes(tmp_path, sizes=[(40 + 7 * i, 90 - 5 * i) for i in range(12)], fixed=False)
    return tmp_path


def test_images_of_one_size_are_kept_in_memory_and_equal_the_stream(fixed: Path) -> None:
    memory, stream = _open(fixed), _open(fixed, cache="stream")
    assert isinstance(memory, ArrayDataset)
    assert isinstance(stream, TfdsDataset)
    assert memory.fingerprint == stream.fingerprint  # a run may be continued with the other
    assert memory.class_names == tuple(NAMES)
    everything = np.arange(12)
    for columns in (memory.examples(everything), pickle.loads(pickle.dumps(stream)).examples(everything)):
        assert columns["image"].dtype == np.uint8
        np.testing.assert_array_equal(columns["label"], memory.columns["label"])
        np.testing.assert_array_equal(columns["image"], memory.columns["image"])
    decoded = {Decoder(3).decode(_jpeg((16, 16), seed)).tobytes() for seed in range(12)}
    assert {image.tobytes() for image in memory.columns["image"]} == decoded


def test_splits_are_sliced_as_tfds_slices_them(fixed: Path) -> None:
    whole = _open(fixed).examples(np.arange(12))["image"]
    part = _open(fixed, "train[50%:]+test")
    assert part.num_examples == 12
    np.testing.assert_array_equal(part.examples(np.arange(6))["image"], whole[6:])
    with pytest.raises(ConfigError, match="'train', 'test'"):
        _open(fixed, "validation")
    with pytest.raises(ConfigError, match="no example"):
        _open(fixed, "train[:0]")


def test_images_of_varying_size_are_streamed(varied: Path) -> None:
    dataset = _open(varied, image_size=(64, 32))
    assert not dataset.in_memory
    assert dataset.examples(np.array([3, 0]))["image"].shape == (2, 64, 32, 3)
    memory = _open(varied, cache="memory", channels=1)
    assert memory.in_memory
    assert memory.fingerprint != _open(varied, channels=1).fingerprint  # its random crops are others
    assert memory.examples(np.array([3]))["image"].shape == (1, 16, 16, 1)


def test_evaluation_crops_larger_images(varied: Path) -> None:
    dataset = _open(varied, image_size=(64, 64))
    assert isinstance(dataset, TfdsDataset)
    rows = np.arange(12)
    evaluation, training = dataset.examples(rows), dataset.examples(rows, evaluation=False)
    for row, data in enumerate(dataset.encoded(rows)[0]):
        picture = Image.open(io.BytesIO(data or b""))
        for images, short in ((evaluation["image"], 73), (training["image"], 64)):  # 73 is 64 / 224 of 256
            width, height = (short * edge // min(picture.size) for edge in picture.size)
            left, top = round((width - 64) / 2), round((height - 64) / 2)
            expected = pillows(picture, (height, width))[top : top + 64, left : left + 64]
            assert np.abs(images[row] - expected).mean() < 0.05, (row, short)
        assert np.abs(evaluation["image"][row] - training["image"][row].astype(float)).mean() > 2
    small = _open(varied)
    assert isinstance(small, TfdsDataset)
    assert small.identity["decode_rules"] == 1  # fixed: runs on small images go on under newer versions
    np.testing.assert_array_equal(small.examples(rows)["image"], small.examples(rows, evaluation=False)["image"])


def test_what_evaluation_crops_is_not_kept_decoded(varied: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluation sees a smaller crop than training; use data\.cache='stream'"):
        _open(varied, image_size=(64, 64), cache="memory")
    prepare_shapes(tmp_path / "one_size", sizes=[(80, 80)] * 12, fixed=True)
    assert isinstance(_open(tmp_path / "one_size", image_size=(64, 64)), TfdsDataset)
    assert isinstance(_open(tmp_path / "one_size", image_size=(80, 80)), ArrayDataset)
    assert isinstance(_open(tmp_path / "one_size", image_size=(32, 32)), ArrayDataset)


def test_streamed_batches_do_not_depend_on_workers_or_hosts(varied: Path) -> None:
    dataset = _open(varied)

    def run(rows: np.ndarray, start: int, workers: int) -> list[dict[str, np.ndarray]]:
        with train_batches(
            dataset,
            augment="crop_flip",
            randaugment=RandAugment(2, 9.0, 0.5, (0,)),
            seed=1,
            global_batch_size=8,
            start_step=start,
            total_steps=4,
            rows=rows,
            num_workers=workers,
        ) as batches:
            return list(batches)

    whole = run(np.arange(8), 0, 0)
    for rows, start, workers in ((np.arange(4, 8), 1, 0), (np.arange(8), 2, 2)):
        for batch, expected in zip(run(rows, start, workers), whole[start:], strict=True):
            np.testing.assert_array_equal(batch["image"], expected["image"][rows])
            np.testing.assert_array_equal(batch["label"], expected["label"][rows])


def test_the_decoded_copy_is_used_again_and_made_again(fixed: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = _open(fixed).examples(np.arange(12))
    (entry,) = (fixed / "cache").iterdir()
    file = entry / "image.npy"
    inode = file.stat().st_ino
    assert len(pickle.dumps(_open(fixed))) < 2000  # mapped: workers get the path
    assert file.stat().st_ino == inode
    content = file.read_bytes()
    for corrupted in (content[: len(content) // 2], b"", content[:-1] + bytes([content[-1] ^ 1])):
        file.write_bytes(corrupted)
        with caplog.at_level(logging.WARNING):
            again = _open(fixed).examples(np.arange(12))
        assert "corrupted" in caplog.text
        caplog.clear()
        np.testing.assert_array_equal(again["image"], before["image"])
        assert file.read_bytes() == content
    (entry / "meta.json").unlink()
    np.testing.assert_array_equal(_open(fixed).examples(np.arange(12))["image"], before["image"])
    assert [path.name for path in (fixed / "cache").iterdir()] == [entry.name]


def test_a_cache_that_cannot_be_written_means_memory_only(fixed: Path, caplog: pytest.LogCaptureFixture) -> None:
    (fixed / "file").write_text("in the way")
    dataset = _open(fixed, cache_dir=str(fixed / "file"))
    assert "memory only" in caplog.text
    np.testing.assert_array_equal(
        dataset.examples(np.arange(12))["image"], _open(fixed).examples(np.arange(12))["image"]
    )


def test_processes_may_fill_the_cache_together(fixed: Path) -> None:
    code = "import sys; from tests.test_tfds import _open; from pathlib import Path; _open(Path(sys.argv[1]))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    children = [subprocess.Popen([sys.executable, "-c", code, str(fixed)], env=environment) for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0]
    assert len(list((fixed / "cache").iterdir())) == 1


def test_undecodable_records_are_left_out_at_load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepare_shapes(tmp_path, sizes=[(16, 16)] * 12, fixed=True, broken=(2,))
    with pytest.raises(
        DataFault, match=r"1 of 12 .*shapes/1.0.0 split 'train' example \d+ \(record \d+ of .*array_record"
    ):
        _open(tmp_path)
    for _ in range(2):  # decoded, then from the cache
        dataset = _open(tmp_path, max_bad_share=0.1)
        assert dataset.num_examples == 11
        assert len(dataset.bad_records) == 1
        assert "array_record" in dataset.bad_records[0]
    assert "left out 1 record" in caplog.text
    with pytest.raises(DataFault, match="1 of 12"):  # the cached copy does not hide it
        _open(tmp_path)
    assert dataset.fingerprint != _open(tmp_path, cache="stream").fingerprint


def test_undecodable_records_are_passed_over_in_a_stream(tmp_path: Path) -> None:
    prepare_shapes(tmp_path, sizes=[(30, 20)] * 12, fixed=False, broken=(2,))
    dataset = _open(tmp_path, max_bad_share=0.1)
    with eval_batches(dataset, global_batch_size=4, rows=np.arange(4)) as batches:
        assert sum(batch["weight"].sum() for batch in batches) == 11
        assert len(batches.bad_records) == 1
    with pytest.raises(DataFault, match="split 'train' example"):
        _open(tmp_path).examples(np.arange(12))


def _record_file(directory: Path, split: str = "train") -> Path:
    (file,) = directory.glob(f"*{split}.array_record*")
    return file


def test_a_missing_or_cut_file_is_named_at_start(tmp_path: Path) -> None:
    file = _record_file(prepare_shapes(tmp_path, sizes=[(16, 16)] * 12, fixed=True))
    content = file.read_bytes()
    for corrupted in (content[: len(content) // 2], content[:-1000], b""):
        file.write_bytes(corrupted)
        with pytest.raises(DataFault, match=rf"{file.name}.*truncated or corrupted.*Restore"):
            _open(tmp_path)
    file.unlink()
    with pytest.raises(DataFault, match=rf"{file.name} is missing"):
        _open(tmp_path)


def test_a_corrupted_record_counts_as_undecodable(tmp_path: Path) -> None:
    file = _record_file(prepare_shapes(tmp_path, sizes=[(16, 16)] * 12, fixed=True))
    content = bytearray(file.read_bytes())
    content[300] ^= 255  # in the first chunk of records; array_record keeps a hash of each
    file.write_bytes(content)
    with pytest.raises(DataFault, match=r"records do not decode.*example 0 \(record 0 of"):
        _open(tmp_path)


def test_a_label_outside_the_classes_is_named(tmp_path: Path) -> None:
    prepare_shapes(tmp_path, sizes=[(16, 16)] * 4, fixed=True, labels=[0, 1, -1, 2])  # -1 is TFDS's "unknown"
    assert _open(tmp_path).num_examples == 4  # enough for a pretraining
    dataset = _open(tmp_path, cache="stream")
    dataset.require_labels()
    with pytest.raises(DataFault, match=r"split 'train' example \d \(record .* has label -1.*0 \.\. 2"):
        dataset.examples(np.arange(4))


def test_what_cannot_be_opened_is_said(fixed: Path) -> None:
    with pytest.raises(ConfigError, match="no dataset 'cifra10'"):
        _open(fixed, name="cifra10")
    with pytest.raises(ConfigError, match="is a data set itself; name the directory above") as refused:
        _open(fixed / "shapes" / "1.0.0")
    _open(Path(str(refused.value).rpartition("--config.data.data_dir=")[2]))
    with pytest.raises(ConfigError, match=r"model\.channels=4"):
        _open(fixed, channels=4)
    with pytest.raises(ConfigError, match=r"data\.stage copies data\.data_dir, which is empty"):
        _open(fixed, data_dir="", stage=True)


def test_what_is_prepared_is_known_without_opening_it(fixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fixed / "cifar10").mkdir()
    (fixed / "imagenet2012" / "5.1.0").mkdir(parents=True)
    monkeypatch.setattr(constants, "DATA_DIR", str(fixed))
    for data_dir in (str(fixed), ""):
        assert is_prepared("shapes", data_dir)
        assert is_prepared("shapes:1.0.0", data_dir)
        for name in ("cifar10", "imagenet2012", "shapes:2.0.0", "cifra10"):
            assert not is_prepared(name, data_dir)
    assert not is_prepared("shapes", "gs://bucket")
    with pytest.raises(DataFault, match=rf"mae_dist\.prepare imagenet2012 --data_dir={fixed} --manual_dir=<"):
        _open(fixed, name="imagenet2012")
    assert DescribedDataset("imagenet2012:5.1.0", "validation").num_examples == 50_000


def _cifar_archive(path: Path) -> tuple[dict[str, np.ndarray], UrlInfo]:
    """A small archive in the exact layout of cifar-10-binary.tar.gz."""
    rng = np.random.default_rng(0)
    names = [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]
    records = {name: rng.integers(0, 256, (3, 3073), dtype=np.uint8) for name in names}
    content = {}
    for name, record in records.items():
        record[:, 0] %= 10
        content[name] = record.tobytes()
    labels = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    content["batches.meta.txt"] = ("\n".join(labels) + "\n\n").encode()
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, data in content.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    data = path.read_bytes()
    return records, UrlInfo(size=Size(len(data)), checksum=hashlib.sha256(data).hexdigest(), filename=path.name)


@pytest.mark.usefixtures("no_tensorflow")
def test_cifar_is_prepared_from_its_archive_without_tensorflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    records, url_info = _cifar_archive(tmp_path / "downloads" / "manual" / "cifar-10-binary.tar.gz")
    monkeypatch.setattr(cifar.Cifar10FromArchive, "url_infos", {CIFAR_URL: url_info})
    arguments = {"name": "cifar10", "image_size": (32, 32)}
    failures: list[BaseException] = []

    def start() -> None:
        try:
            _open(tmp_path, **arguments)
        except BaseException as error:
            failures.append(error)

    together = [threading.Thread(target=start) for _ in range(2)]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    assert not failures
    with caplog.at_level(logging.INFO):
        _open(tmp_path, **arguments)
    assert "Load dataset info" in caplog.text
    assert "differ on disk" not in caplog.text
    assert (tmp_path / "cifar10" / "3.0.2" / "dataset_info.json").exists()
    for split, names in (("train", sorted(records)[:5]), ("test", ["test_batch.bin"])):
        expected = np.concatenate([records[name] for name in names])
        dataset = _open(tmp_path, split, **arguments)
        got = dataset.examples(np.arange(dataset.num_examples))
        flat = got["image"].transpose(0, 3, 1, 2).reshape(-1, 3072)
        both = np.concatenate([got["label"][:, None].astype(np.uint8), flat], axis=1)
        # TFDS stores examples in the order of a hash; every pixel must be there exactly once.
        assert sorted(map(bytes, both)) == sorted(map(bytes, expected))
        assert dataset.class_names[3] == "cat"


def test_an_archive_with_another_checksum_is_refused(tmp_path: Path) -> None:
    _cifar_archive(tmp_path / "downloads" / "manual" / "cifar-10-binary.tar.gz")
    with pytest.raises(DataFault, match=r"cifar10.*wrong checksum"):
        _open(tmp_path, name="cifar10", image_size=(32, 32))
    assert not (tmp_path / "cifar10" / "3.0.2").exists()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_no_network_is_said_in_seconds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(DataFault) as fault:
        _open(tmp_path, name=name)
    message = str(fault.value)
    archive = f"{name.replace('cifar', 'cifar-')}-binary.tar.gz"
    for part in (str(tmp_path), archive, str(tmp_path / "downloads" / "manual" / archive), "configs/quickstart.py"):
        assert part in message


@pytest.mark.usefixtures("no_tensorflow")
def test_a_set_that_needs_tensorflow_to_be_prepared_says_so(tmp_path: Path) -> None:
    archive = tmp_path / "downloads" / "manual" / "train-images-idx3-ubyte.gz"
    archive.parent.mkdir(parents=True)
    archive.touch()  # so that no connection is tried
    with pytest.raises(DataFault, match="mnist"):
        _open(tmp_path, name="mnist", channels=1)


def test_nothing_here_imports_tensorflow() -> None:
    code = "import sys, mae_dist.data.sources.tfds, mae_dist.data.sources.cifar; sys.exit('tensorflow' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_images_alone_and_arrays_are_read(tmp_path: Path) -> None:
    """Without a label, as Images of 16 bits, and as Tensors of whole and of floating-point numbers."""
    rng = np.random.default_rng(0)
    kinds: dict[str, tuple[Any, np.ndarray]] = {
        "deep": (
            tfds.features.Image(shape=(8, 8, 1), dtype=np.uint16),
            rng.integers(0, 65536, (4, 8, 8, 1), np.uint16),
        ),
        "bands": (
            tfds.features.Tensor(shape=(8, 8, 13), dtype=np.uint16),
            rng.integers(0, 9000, (4, 8, 8, 13), np.uint16),
        ),
        "floats": (tfds.features.Tensor(shape=(8, 8, 2), dtype=np.float32), rng.random((4, 8, 8, 2), np.float32)),
    }
    for name, (feature, arrays) in kinds.items():
        is_file = isinstance(feature, tfds.features.Image)
        examples = [cv2.imencode(".png", array)[1].tobytes() if is_file else array for array in arrays]
        features = tfds.features.FeaturesDict({"image": feature})

        class Alone(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            VERSION = tfds.core.Version("1.0.0")
            content = features, examples

            def _info(self) -> tfds.core.DatasetInfo:
                return tfds.core.DatasetInfo(builder=self, features=self.content[0])

            def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
                return {"train": self._generate_examples()}

            def _generate_examples(self) -> Iterator[Any]:
                yield from ((index, {"image": example}) for index, example in enumerate(self.content[1]))

        Alone.name = name
        Alone(data_dir=tmp_path).download_and_prepare(file_format="array_record")
        dataset = _open(tmp_path, name=name, image_size=(8, 8), channels=arrays.shape[-1])
        columns = dataset.examples(np.arange(4))
        assert dataset.num_classes == 0
        assert columns["label"].tolist() == [-1] * 4
        assert columns["image"].dtype == arrays.dtype
        found = {image.tobytes() for image in columns["image"]}
        assert found == {array.tobytes() for array in arrays}
