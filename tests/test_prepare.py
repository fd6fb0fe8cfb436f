"""Data sets prepared from ImageNet's archives and from directories, whole, killed, damaged; read by TFDS and by us."""

import io
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tifffile
from ml_collections import ConfigDict
from PIL import Image
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder as tfds_imagenet

from mae_dist import get_config
from mae_dist.data import open_split, statistics
from mae_dist.data.files import check_space
from mae_dist.data.from_config import open_data
from mae_dist.data.sources.tfds import TfdsDataset
from mae_dist.errors import EXIT_CONFIG, EXIT_DATA, EXIT_DONE, ConfigError, DataFault
from mae_dist.prepare import __main__ as prepare_module
from mae_dist.prepare import archives, examine, folders, tfds_writer
from tests import commands
from tests.conftest import ROOT

_LABELS = Path(tfds.core.tfds_path("datasets/imagenet2012"))
_SYNSETS = (_LABELS / "labels.txt").read_text().split()
_VALIDATION = (_LABELS / "validation_labels.txt").read_text().split()


def _image(number: int, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    """Its mean colour tells the number."""
    buffer = io.BytesIO()
    colour = (number * 37 % 256, number * 11 % 256, 200)
    Image.new("RGB", (30 + number % 7, 24), colour).convert(mode).save(buffer, kind, quality=95)
    return buffer.getvalue()


def _tar(path: Path, members: dict[str, bytes]) -> bytes:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path.read_bytes()


@pytest.fixture(scope="module")
def manual_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Archives laid out and named as ImageNet's: three classes with one CMYK and one PNG image, nine for validation."""
    root = tmp_path_factory.mktemp("manual")
    classes = {}
    for name in ("n02105855", "n01739381", "n01440764"):
        number = _SYNSETS.index(name)
        images = {f"{name}_{i}.JPEG": _image(number + i) for i in (1, 10, 100)}
        if name == "n02105855":
            images[tfds_imagenet.PNG_IMAGES[0]] = _image(number, "PNG")
        if name == "n01739381":
            images[tfds_imagenet.CMYK_IMAGES[0]] = _image(number, mode="CMYK")
        classes[f"{name}.tar"] = _tar(root / "class.tar", images)
    (root / "class.tar").unlink()
    _tar(root / "ILSVRC2012_img_train.tar", classes)
    validation = {f"ILSVRC2012_val_{i:08d}.JPEG": _image(i) for i in (3, 1, 2, 50_000, 7, 8, 9, 10, 11)}
    _tar(root / "ILSVRC2012_img_val.tar", validation)
    return root


@pytest.fixture
def prepare(child_env: Callable[..., dict[str, str]]) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mae_dist.prepare", *map(str, arguments)]
        return subprocess.run(
            command, env=child_env(), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )

    return run


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command in this process; returns what it prints."""

    def run(*names: str, **given: object) -> str:
        places = ("manual_dir", "data_dir", "from_folder", "name")
        options = (
            "limit",
            "allow_incomplete",
            "skip_undecodable",
            "labels",
            "val_fraction",
            "short_side",
            "quality",
            "max_pixels",
        )
        for name in (*places, *options, "stats"):
            value = given.get(name) and (str(given[name]) if name in places else given[name])
            monkeypatch.setattr(prepare_module, f"_{name.upper()}", SimpleNamespace(name=name, value=value))
        assert prepare_module.prepare(["prepare", *names]) == EXIT_DONE
        return capsys.readouterr().out

    return run


def _config_of(printed: str) -> ConfigDict:
    """The config of the command that was printed."""
    python, _, module, *arguments = shlex.split(printed.splitlines()[-1])
    assert (python, module) == ("python", "mae_dist.main")
    config = commands.parse("main", arguments)
    assert config is not None
    return config


def _open(data_dir: Path, name: str, split: str, *, image_size: tuple[int, int] = (24, 24), channels: int = 3) -> Any:
    return open_split(
        split,
        image_size=image_size,
        channels=channels,
        source="tfds",
        name=name,
        data_dir=str(data_dir),
        cache="stream",
        cache_dir="",
        stage=False,
        max_bad_share=0.0,
        num_examples=0,
        num_classes=0,
    )


@pytest.mark.long
def test_imagenet_is_what_tfds_reads(
    manual_dir: Path, tmp_path: Path, prepare: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    with pytest.raises(DataFault, match="11 images of 3 classes with 0 to 4 each, where ImageNet has 1281167 of 1000"):
        archives.imagenet_images(manual_dir, allow_incomplete=False)
    done = prepare("imagenet2012", f"--manual_dir={manual_dir}", f"--data_dir={tmp_path}", "--allow_incomplete")
    assert done.returncode == EXIT_DONE, done.stderr
    assert "train 11, validation 9" in done.stdout
    opened = open_data(_config_of(done.stdout))
    assert (opened.train.num_examples, opened.val and opened.val.num_examples, opened.test) == (11, 9, None)
    builder: Any = tfds.builder("imagenet2012", data_dir=tmp_path)
    assert builder.is_prepared()
    assert builder.info.features["label"].names == _SYNSETS
    sources = {split: builder.as_data_source(split=split) for split in ("train", "validation")}
    files = {example["file_name"].decode(): example for example in sources["train"]}
    assert len(files) == 11
    for name, example in files.items():
        synset, number = name.removesuffix(".JPEG").split("_")
        assert example["label"] == _SYNSETS.index(synset)
        odd = name in (*tfds_imagenet.CMYK_IMAGES, *tfds_imagenet.PNG_IMAGES)
        shown = _SYNSETS.index(synset) + (0 if odd else int(number))
        colour = np.array([shown * 37 % 256, shown * 11 % 256, 200])
        assert np.abs(example["image"].mean(axis=(0, 1)) - colour).max() < 5, name
    for example in sources["validation"]:
        number = int(example["file_name"].decode()[-13:-5])
        assert example["label"] == _SYNSETS.index(_VALIDATION[number - 1])
    again = prepare("imagenet2012", f"--data_dir={tmp_path}")
    assert again.returncode == EXIT_DATA
    assert "differ on disk" not in again.stderr
    assert "prepared with a part of ImageNet ({'train': 11, 'validation': 9}), and {'train': 1281167" in again.stderr
    train = _open(tmp_path, "imagenet2012", "train")
    assert isinstance(train, TfdsDataset)
    stored, _ = train.encoded(np.arange(11))
    assert {Image.open(io.BytesIO(data or b"")).format for data in stored} == {"JPEG"}
    assert {Image.open(io.BytesIO(data or b"")).mode for data in stored} == {"RGB"}
    assert sorted(train.examples(np.arange(11))["label"]) == sorted(example["label"] for example in files.values())


def test_archives_that_are_missing_cut_or_others_are_told(manual_dir: Path, tmp_path: Path) -> None:
    for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"):
        (tmp_path / name).write_bytes((manual_dir / name).read_bytes())
    train = tmp_path / "ILSVRC2012_img_train.tar"
    content = train.read_bytes()
    for cut in (700, 1100, len(content) // 2):
        train.write_bytes(content[:cut])
        with pytest.raises(DataFault, match=r"train\.tar.*(corrupted|holds)"):
            archives.imagenet_images(tmp_path, allow_incomplete=False)
    train.write_bytes(content)
    page = b"<!DOCTYPE html>\n<html><body>Please sign in.</body></html>\n" * 20
    for path in (train, tmp_path / "ILSVRC2012_img_val.tar"):
        good = path.read_bytes()
        for download in (b"", page):
            path.write_bytes(download)
            with pytest.raises(DataFault, match=rf"{path.name} is no tar archive, or corrupted .*download it again"):
                archives.imagenet_images(tmp_path, allow_incomplete=True)
        path.write_bytes(good)
    _tar(train, {"n01440764.tar": page})
    with pytest.raises(DataFault, match=r"n01440764\.tar is no tar archive"):
        archives.imagenet_images(tmp_path, allow_incomplete=True)
    _tar(train, {"photos.tar": b""})
    with pytest.raises(DataFault, match=r"photos\.tar, which is no class"):
        archives.imagenet_images(tmp_path, allow_incomplete=True)
    train.unlink()
    with pytest.raises(DataFault, match=r"missing: .*ILSVRC2012_img_train\.tar; .*image-net\.org"):
        archives.imagenet_images(tmp_path, allow_incomplete=True)


def test_a_directory_without_a_data_set_is_no_data_set(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "many" / "1.0.0"
    directory.mkdir(parents=True)
    (directory / "notes.txt").touch()
    with pytest.raises(DataFault, match=r"1\.0\.0 is in the way"):
        begin(folder, directory, monkeypatch)
    (directory / "notes.txt").unlink()
    begin(folder, directory, monkeypatch)
    builder: Any = tfds.builder("many", data_dir=tmp_path)
    assert builder.info.splits["train"].num_examples == 4


def test_shards_outlive_a_rename_that_fails(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "many" / "1.0.0"
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if target == directory:
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    with monkeypatch.context() as failing:
        failing.setattr(Path, "rename", refused)
        with pytest.raises(DataFault, match=r"Permission denied.*goes on where it stopped"):
            begin(folder, directory, monkeypatch)
    made = {path.name: path.stat().st_mtime_ns for path in directory.with_name(".1.0.0.incomplete").glob("many-*")}
    begin(folder, directory, monkeypatch)
    assert {path.name: path.stat().st_mtime_ns for path in directory.glob("many-*")} == made
    assert len(made) == 3
    assert not (directory / "plan.json").exists()


def test_a_disk_that_fills_up_is_a_data_fault(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "many" / "1.0.0"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # of a file: the plan has room, a shard has not
    try:
        with pytest.raises(DataFault, match=r"preparing many .* failed: .*File too large.*ulimit -f"):
            begin(folder, directory, monkeypatch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    begin(folder, directory, monkeypatch)
    assert (directory / "dataset_info.json").exists()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes for training, one for validation; several formats."""
    root = tmp_path / "folder"
    for number, path in enumerate(
        ("train/cat/a.jpg", "train/cat/b.PNG", "train/dog/deep/c.webp", "train/dog/d.bmp", "val/dog/e.jpeg")
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        kind = {"jpg": "JPEG", "jpeg": "JPEG"}.get(Path(path).suffix[1:], Path(path).suffix[1:].upper())
        (root / path).write_bytes(_image(number, kind))
    return root


@pytest.mark.long
def test_a_folder_becomes_a_data_set(
    folder: Path, tmp_path: Path, prepare: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    (folder / "train" / "cat" / "notes.jpg").write_text("no image")
    with pytest.raises(DataFault, match=r"1 of 6 files .*train/cat/notes\.jpg \(8 bytes .*not a whole image"):
        examined(folder)
    done = prepare(f"--from_folder={folder}", "--name=my_set", f"--data_dir={tmp_path}", "--skip_undecodable")
    assert done.returncode == EXIT_DONE, done.stderr
    opened = open_data(_config_of(done.stdout))
    assert (opened.train.num_examples, opened.val and opened.val.num_examples, opened.test) == (4, 1, None)
    train, validation = _open(tmp_path, "my_set", "train"), _open(tmp_path, "my_set", "validation")
    assert train.class_names == ("cat", "dog")
    assert validation.examples(np.arange(1))["label"].tolist() == [1]
    got = train.examples(np.arange(4))
    for number, label in enumerate([0, 0, 1, 1]):
        colour = np.array([number * 37 % 256, number * 11 % 256, 200])
        close = np.abs(got["image"].mean(axis=(1, 2)) - colour).max(axis=1) < 5
        assert got["label"][close].tolist() == [label]
    builder: Any = tfds.builder("my_set", data_dir=tmp_path)
    again = prepare(f"--from_folder={folder}", "--name=my_set", f"--data_dir={tmp_path}")
    assert (again.returncode, again.stdout) == (EXIT_DONE, done.stdout), again.stderr
    other = prepare(f"--from_folder={folder}", "--name=my_set", f"--data_dir={tmp_path}", "--limit=2")
    assert other.returncode == EXIT_DATA
    assert "at most 2 of a split: train 5 files" in other.stderr
    names = {example["file_name"].decode() for example in builder.as_data_source(split="train")}
    assert names == {"cat/a.jpg", "cat/b.PNG", "dog/deep/c.webp", "dog/d.bmp"}


def _save(path: Path, image: np.ndarray, **options: Any) -> None:
    """Writes an image by its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, image)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, image, photometric="minisblack")
    else:
        Image.fromarray(image).save(path, **options)


def _stored(data_dir: Path, split: str = "train") -> dict[str, tuple[bytes, int]]:
    """File name -> what is stored of it, label."""
    dataset = _open(data_dir, "my_set", split)
    files, labels = dataset.encoded(np.arange(dataset.num_examples))
    return {dataset.file_name(i): (files[i], int(labels[i])) for i in range(dataset.num_examples)}


LAYOUTS: dict[str, tuple[list[str], dict[str, object], dict[str, dict[str, int]]]] = {
    "flat": (["a.png", "b.JPG"], {}, {"train": {"a.png": -1, "b.JPG": -1}}),
    "deep": (["x/y/a.png", "z/a.png"], {}, {"train": {"x/y/a.png": -1, "z/a.png": -1}}),
    "classes without train": (["dog/a.png", "cat/b.png"], {}, {"train": {"dog/a.png": -1, "cat/b.png": -1}}),
    "classes asked for": (
        ["dog/a.png", "cat/b.png", "loose.png"],
        {"labels": "folders"},
        {"train": {"dog/a.png": 1, "cat/b.png": 0}},
    ),
    "splits without classes": (
        ["train/a.png", "valid/b.png", "test/c.png"],
        {},
        {"train": {"a.png": -1}, "validation": {"b.png": -1}, "test": {"c.png": -1}},
    ),
    "splits and classes": (
        ["train/dog/a.png", "train/cat/b.png", "train/loose.png", "Validation/cat/c.png", "docs/d.png"],
        {},
        {"train": {"dog/a.png": 1, "cat/b.png": 0}, "validation": {"cat/c.png": 0}},
    ),
    "train and others": (
        ["train/dog/a.png", "train/cat/b.png", "docs/d.png"],
        {},
        {"train": {"dog/a.png": 1, "cat/b.png": 0}},
    ),
    "classes not asked for": (["train/dog/a.png"], {"labels": "none"}, {"train": {"dog/a.png": -1}}),
    "a table": (
        ["a.png", "b.png", "c.png", "d.png"],
        {"labels": "a.png,x,train\nb.png,,train\nc.png,w,test\n"},
        {"train": {"a.png": 1, "b.png": -1}, "test": {"c.png": 0}},
    ),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_any_layout_becomes_a_data_set(
    tmp_path: Path, command: Callable[..., str], layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    paths, given, expected = LAYOUTS[layout]
    for path in paths:
        _save(tmp_path / "images" / path, np.zeros((9, 8, 3), np.uint8))
    if "," in str(given.get("labels")):
        (tmp_path / "table.csv").write_text(str(given["labels"]))
        given = {"labels": f"csv:{tmp_path / 'table.csv'}"}
    with caplog.at_level("INFO"):
        printed = command(from_folder=tmp_path / "images", name="my_set", data_dir=tmp_path, **given)
    builder: Any = tfds.builder("my_set", data_dir=tmp_path)
    assert set(builder.info.splits) == set(expected)
    for split, files in expected.items():
        found = _stored(tmp_path, split)
        assert {name: label for name, (_, label) in found.items()} == files
    assert ("label" in builder.info.features) == any(label >= 0 for label in expected["train"].values())
    chosen = "folders, the directories in train/" if "train/dog/a.png" in paths else "none"
    assert (f"labels: {chosen} (" in caplog.text) == (not given)
    assert sum(map(len, expected.values())) == len(paths) or "left out" in caplog.text
    config = _config_of(printed)
    assert config.data.val_split == ("validation" if "validation" in expected else "train[80%:]")
    assert config.data.test_split == ("test" if "test" in expected else "")
    assert command(from_folder=tmp_path / "images", name="my_set", data_dir=tmp_path, **given) == printed


def test_a_part_becomes_the_validation(tmp_path: Path, command: Callable[..., str]) -> None:
    for number in range(40):
        _save(tmp_path / "images" / f"{number}.png", np.zeros((9, 8, 3), np.uint8))
    printed = command(from_folder=tmp_path / "images", name="my_set", data_dir=tmp_path, val_fraction=0.25)
    train, validation = (set(_stored(tmp_path, split)) for split in ("train", "validation"))
    assert len(train | validation) == 40
    assert not train & validation
    assert 0 < len(validation) < 20
    assert _config_of(printed).data.train_split == "train"


_RNG = np.random.default_rng(0)
_DEEP = _RNG.integers(0, 65536, (6, 5), np.uint16)
_BANDS = _RNG.integers(0, 65536, (6, 5, 7), np.uint16)
_FLOATS = _RNG.random((6, 5, 2), np.float32)
_RGBA = _RNG.integers(0, 256, (6, 5, 4), np.uint8)


@pytest.mark.parametrize(
    ("name", "image", "dtype", "expected"),
    [
        ("a.png", _DEEP, "uint16", _DEEP[..., None]),
        ("a.tif", _DEEP, "uint16", _DEEP[..., None]),  # stored as PNG
        ("a.npy", _DEEP[..., None].repeat(3, 2), "uint16", _DEEP[..., None].repeat(3, 2)),
        ("a.npy", _BANDS, "uint16", _BANDS),
        ("a.npy", np.moveaxis(_BANDS[..., :4], 2, 0), "uint16", _BANDS[..., :4]),
        ("a.tif", _BANDS, "uint16", _BANDS),
        ("a.npy", _FLOATS, "float32", _FLOATS),
        ("a.npy", _RGBA[..., :3], "uint8", _RGBA[..., :3]),
        ("a.png", _RGBA, "uint8", _RGBA),
    ],
)
def test_images_of_other_types(
    tmp_path: Path, command: Callable[..., str], name: str, image: np.ndarray, dtype: str, expected: np.ndarray
) -> None:
    """They keep their values, read by us and, where it needs no TensorFlow, by TFDS."""
    for number in range(2):
        _save(tmp_path / "images" / f"{number}{name}", image)
    printed = command(from_folder=tmp_path / "images", name="my_set", data_dir=tmp_path)
    channels = expected.shape[-1]
    dataset = _open(tmp_path, "my_set", "train", image_size=(6, 5), channels=channels)
    assert dataset.dtype == dtype
    for stored in dataset.examples(np.arange(2))["image"]:
        np.testing.assert_array_equal(stored, expected)
    builder: Any = tfds.builder("my_set", data_dir=tmp_path)
    feature = builder.info.features["image"]
    assert (feature.np_dtype, feature.shape[-1]) == (dtype, channels)
    assert _config_of(printed).model.channels == (channels if channels not in (3, 4) or name != "a.png" else 3)
    if dtype != "float32":
        for example in builder.as_data_source(split="train"):
            np.testing.assert_array_equal(example["image"].reshape(expected.shape), expected)


def test_arrays_need_one_shape_and_all_files_one_type(tmp_path: Path, command: Callable[..., str]) -> None:
    given = {"from_folder": tmp_path / "images", "name": "my_set", "data_dir": tmp_path}
    _save(tmp_path / "images" / "a.npy", _BANDS)
    _save(tmp_path / "images" / "b.npy", _BANDS[:5])
    with pytest.raises(ConfigError, match=r"all have one shape.*\(6, 5, 7\), b\.npy: .*data\.source=folder"):
        command(**given)
    (tmp_path / "images" / "b.npy").unlink()
    _save(tmp_path / "images" / "b.png", _RGBA)
    _save(tmp_path / "images" / "c.png", _RGBA)
    with pytest.raises(DataFault, match=r"1 of 3 files .*a\.npy \(an image of uint16 in a set of uint8\)"):
        command(**given)
    command(**given, skip_undecodable=True)
    assert set(_stored(tmp_path)) == {"b.png", "c.png"}


def test_smaller_copies(tmp_path: Path, command: Callable[..., str]) -> None:
    """As Pillow resizes them; alpha and 16 bits are kept; what is small enough is stored as it is."""
    root = tmp_path / "images"
    smooth = (np.add.outer(np.arange(300), np.arange(200)[:, None] * [1, 0.5, 0.2]) / 2).astype(
        np.uint8
    )  # (300, 200, 3)
    _save(root / "large.jpg", smooth, quality=98, subsampling=0)
    _save(root / "large.png", smooth)
    _save(root / "gray.jpg", smooth[..., 0], quality=98)
    _save(root / "small.jpg", smooth[:90, :64])
    _save(root / "alpha.png", np.dstack([smooth, np.full((300, 200), 99, np.uint8)]))
    given = {"name": "my_set", "short_side": 64}
    command(from_folder=root, data_dir=tmp_path, **given, quality=97)
    stored = {name: data for name, (data, _) in _stored(tmp_path).items()}
    assert stored["small.jpg"] == (root / "small.jpg").read_bytes()
    right = Image.fromarray(smooth).resize((64, 96), Image.Resampling.BICUBIC)
    for name, kind, mode in (("large.jpg", "JPEG", "RGB"), ("large.png", "JPEG", "RGB"), ("gray.jpg", "JPEG", "L")):
        with Image.open(io.BytesIO(stored[name])) as image:
            assert (image.format, image.mode, image.size) == (kind, mode, (64, 96)), name
            expected = np.asarray(right, float)[..., 0] if mode == "L" else np.asarray(right, float)
            assert np.abs(np.asarray(image, float) - expected).mean() < 2, name
    with Image.open(io.BytesIO(stored["alpha.png"])) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGBA", (64, 96))
        assert np.abs(np.asarray(image, float)[..., :3] - np.asarray(right, float)).max() < 4
        assert (np.asarray(image)[..., 3] == 99).all()
    again = command(from_folder=root, data_dir=tmp_path, **given, quality=97)
    assert "train 5" in again
    with pytest.raises(DataFault, match=r"short side 64, quality 97: .*which is now .*quality 90"):
        command(from_folder=root, data_dir=tmp_path, **given)
    command(from_folder=root, data_dir=tmp_path / "other", **given, quality=10)
    assert len(_stored(tmp_path / "other")["large.jpg"][0]) < len(stored["large.jpg"])


def test_smaller_copies_of_other_types(tmp_path: Path, command: Callable[..., str]) -> None:
    deep = np.add.outer(np.arange(40) * 1000, np.arange(60) * 300).astype(np.uint16)
    for name, image in (
        ("deep/a.png", deep),
        ("bands/a.npy", np.stack([deep] * 5, axis=-1).astype(np.float32) / 65535),
    ):
        _save(tmp_path / name, image)
        data_dir = tmp_path / "data" / name
        command(from_folder=(tmp_path / name).parent, name="my_set", data_dir=data_dir, short_side=20)
        channels = 1 if image.ndim == 2 else 5
        got = _open(data_dir, "my_set", "train", image_size=(20, 30), channels=channels).examples(np.arange(1))["image"]
        top = 65535 if image.ndim == 2 else 1
        assert got.shape == (1, 20, 30, channels)
        assert np.abs(got[0, ..., 0] / top - deep[::2, ::2] / 65535).max() < 0.02


def test_photographs_are_stored_upright(
    tmp_path: Path, command: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    """TFDS sets are read without EXIF. Only what has to be turned is encoded anew."""
    left = np.zeros((40, 60, 3), np.uint8)
    left[:, :20] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # turned right to be upright
    _save(tmp_path / "images" / "turned.jpg", left, exif=exif)
    _save(tmp_path / "images" / "turned.png", left, exif=exif)
    _save(tmp_path / "images" / "upright.jpg", left)
    with caplog.at_level("INFO"):
        command(from_folder=tmp_path / "images", name="my_set", data_dir=tmp_path)
    assert "2 images are turned by their EXIF orientation" in caplog.text
    stored = {name: data for name, (data, _) in _stored(tmp_path).items()}
    assert stored["upright.jpg"] == (tmp_path / "images" / "upright.jpg").read_bytes()
    for name, kind in (("turned.jpg", "JPEG"), ("turned.png", "PNG")):
        with Image.open(io.BytesIO(stored[name])) as image:
            assert (image.format, image.size) == (kind, (40, 60))
            assert image.getexif().get(0x0112, 1) == 1
            np.testing.assert_allclose(np.asarray(image, float), np.rot90(left, -1), atol=12)


def test_changed_files_are_named(tmp_path: Path, command: Callable[..., str]) -> None:
    given = {"from_folder": tmp_path / "images", "name": "my_set", "data_dir": tmp_path}
    for name in "abc":
        _save(tmp_path / "images" / f"{name}.png", np.zeros((9, 8, 3), np.uint8))
    command(**given)
    _save(tmp_path / "images" / "d.png", np.zeros((9, 8, 3), np.uint8))
    (tmp_path / "images" / "a.png").unlink()
    _save(tmp_path / "images" / "b.png", _RGBA)
    with pytest.raises(DataFault, match=r"\(1 added: d\.png; 1 gone: a\.png; 1 of another size: b\.png\); delete it"):
        command(**given)
    command(**given | {"name": "another"})


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"from_folder": "nowhere"}, DataFault, "--from_folder=nowhere does not exist"),
        ({"from_folder": "empty"}, DataFault, r"--from_folder=empty holds no image .*left out 1 files"),
        ({"labels": "csv:nowhere.csv"}, ConfigError, "--labels='csv:nowhere.csv' cannot be read"),
        ({"labels": "csv"}, ConfigError, "--labels='csv' is not one of none, folders, csv:FILE"),
        ({"labels": "folders"}, DataFault, "no directories of classes"),
        ({"labels": "csv:test.csv"}, DataFault, "no image for training, only of test"),
        ({"skip_undecodable": True, "from_folder": "broken"}, DataFault, "1 of 1 files in broken do not decode"),
        ({"max_pixels": 71}, DataFault, r"a\.png \(an image of 9 x 8 pixels, more than 71: shrink it"),
        ({"from_folder": "infinite"}, DataFault, r"a\.npy \(it holds values that are not finite\)"),
    ],
)
def test_folders_that_cannot_be_prepared(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Callable[..., str],
    given: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    _save(Path("images/a.png"), np.zeros((9, 8, 3), np.uint8))
    _save(Path("infinite/a.npy"), np.full((9, 8, 3), np.inf, np.float32))
    Path("empty").mkdir()
    Path("empty/readme.txt").touch()
    Path("broken").mkdir()
    Path("broken/a.png").touch()
    Path("test.csv").write_text("a.png,1,test\n")
    with pytest.raises(error, match=message):
        command(**{"from_folder": "images", "name": "my_set", "data_dir": tmp_path / "data", **given})


def test_statistics_are_printed_as_flags_and_stored(
    tmp_path: Path, command: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a limited number of images, evenly spaced, as fractions of what data.max_value says."""
    config = get_config("smoke")
    config.data.update(source="folder", data_dir=str(tmp_path / "images"), train_split="all", max_value=4000.0)
    config.data.cache_dir = str(tmp_path / "cache")
    config.model.image_size, config.model.channels = (4, 4), 1
    for number in range(4):
        _save(tmp_path / "images" / f"{number}.png", np.full((4, 4), number * 1000, np.uint16))
    monkeypatch.setattr(prepare_module.cli, "needed_config", lambda: config)
    assert command(stats=True) == "'--config.data.mean=(0.375,)' '--config.data.std=(0.2795,)'\n"
    (stored,) = (tmp_path / "cache" / "statistics").iterdir()
    assert statistics.load_stats(stored.stem, str(tmp_path / "cache")) == ((0.375,), (0.2795084971874737,))
    assert "std=(1,)" in command(stats=True, limit=1)  # one image does not vary


@pytest.mark.long
def test_the_line_that_is_printed_trains(
    tmp_path: Path, prepare: Callable[..., subprocess.CompletedProcess[str]], child_env: Callable[..., dict[str, str]]
) -> None:
    """On photographs of any size without labels, after their statistics were measured."""
    for number in range(40):
        image = np.full((20 + number, 30, 3), number * 6, np.uint8)
        _save(tmp_path / "images" / f"{number % 3}" / f"{number}.jpg", image)
    done = prepare(f"--from_folder={tmp_path / 'images'}", "--name=my_set", f"--data_dir={tmp_path}", "--short_side=24")
    assert done.returncode == EXIT_DONE, done.stderr
    python, *line = shlex.split(done.stdout.splitlines()[-1])
    assert python == "python"
    data = [argument for argument in line if argument.startswith("--config.data")]
    cache = f"--config.data.cache_dir={tmp_path / 'cache'}"
    stats = prepare("--stats", "--config=folder", *data, cache)
    assert stats.returncode == EXIT_DONE, stats.stderr
    small = (
        *("model.image_size=(16,16)", "model.depth=1", "model.embed_dim=32", "model.num_heads=4"),
        *("model.decoder_depth=1", "model.decoder_embed_dim=32", "global_batch_size=8", "total_steps=4"),
    )
    command = [sys.executable, *line, *shlex.split(stats.stdout.strip()), cache, f"--workdir={tmp_path / 'run'}"]
    trained = subprocess.run(
        [*command, *(f"--config.{field}" for field in small)],
        env=child_env(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert trained.returncode == EXIT_DONE, trained.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    pixels = np.concatenate([np.full((30,), number * 6 / 255) for number in range(40)])
    assert abs(config["data"]["mean"][0] - pixels.mean()) < 0.1
    assert len(config["data"]["std"]) == 3
    assert len(list((tmp_path / "cache" / "statistics").iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "now"),
    [
        (lambda folder: (folder / "train/dog/more.jpg").write_bytes(_image(9)), "train 5 files"),
        (lambda folder: (folder / "train/dog/d.bmp").unlink(), "train 3 files"),
        (lambda folder: (folder / "train/dog/d.bmp").rename(folder / "train/cat/d.bmp"), "train 4 files"),
        (lambda folder: (folder / "train/cat/a.jpg").write_bytes(_image(1, "PNG")), "train 4 files"),
    ],
)
def test_a_folder_that_changed_is_not_prepared_already(
    folder: Path, tmp_path: Path, command: Callable[..., Any], change: Callable[[Path], Any], now: str
) -> None:
    """It is named, nothing is deleted, and the cure that the message gives works."""
    given = {"from_folder": folder, "name": "my_set", "data_dir": tmp_path / "data"}
    command(**given)
    first = command(**given)
    change(folder)
    with pytest.raises(DataFault, match=rf"train 4 files.*{now}.*delete it and repeat the command") as refused:
        command(**given)
    shutil.rmtree(str(refused.value).split()[0])
    again = command(**given)
    assert again.splitlines()[1] == first.splitlines()[1]
    assert open_data(_config_of(again)).train.num_examples == int(now.split()[1])


def test_a_folder_prepared_by_an_earlier_version(
    folder: Path, tmp_path: Path, command: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Stays in use: its files were not recorded, which is said."""
    given = {"from_folder": folder, "name": "my_set", "data_dir": tmp_path / "data"}
    printed = command(**given)
    info = tmp_path / "data" / "my_set" / "1.0.0" / "dataset_info.json"
    info.write_text(re.sub(r": train 4 files[^\"]*", ".", info.read_text()))
    with caplog.at_level("WARNING"):
        assert command(**given) == printed
    assert "does not record its files" in caplog.text


def test_a_folder_is_checked_in_parts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = []

    class Pool(examine.ThreadPoolExecutor):
        def map(self, fn: Any, *items: Any, **options: Any) -> Any:
            given.append(len(items[0]))
            return super().map(fn, *items, **options)

    monkeypatch.setattr(examine, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(examine, "_CHUNK", 3)
    with caplog.at_level("INFO"):
        splits = examined(folder)
    assert given == [3, 2]
    assert "5 of 5 files" in caplog.text
    assert [Path(image.path).stat().st_size for image in splits["train"]] == [image.size for image in splits["train"]]


@pytest.mark.long
def test_a_command_that_cannot_work_is_refused(prepare: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    for arguments, said in (
        ((), "name one data set"),
        (("--from_folder=.", "--name=cifar10"), "no name that TFDS has"),
        (("cifar10", "--limit=10"), "--limit is not for cifar10"),
    ):
        refused = prepare(*arguments)
        assert refused.returncode == EXIT_CONFIG
        assert said in refused.stderr


_SLOW = """
import sys, time
import pytest
from pathlib import Path
from mae_dist.prepare import tfds_writer
from tests.test_prepare import begin
write = tfds_writer._Shard.write
def slowly(self, features, convert):
    write(self, features, convert)
    print("written", flush=True)
    time.sleep(1)
tfds_writer._Shard.write = slowly
begin(Path(sys.argv[1]), Path(sys.argv[2]), pytest.MonkeyPatch())
"""


def examined(root: Path) -> dict[str, list[tfds_writer.Image]]:
    """The images of a directory, of which none may be undecodable."""
    return _examine(root)[0]


def _examine(root: Path) -> tuple[dict[str, list[tfds_writer.Image]], examine.Storage]:
    folder = folders.find_folder(str(root), None, 0.0)
    return examine.examine(folder, skip_undecodable=False, short_side=20, quality=90)


def begin(folder: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepares smaller copies of a folder's images in shards of three."""
    from tensorflow_datasets.core.dataset_info import DatasetIdentity
    from tensorflow_datasets.core.utils import shard_utils

    in_threes = staticmethod(lambda size, count: -(-count // 3))
    monkeypatch.setattr(shard_utils.ShardConfig, "calculate_number_shards", in_threes)
    monkeypatch.setattr(tfds_writer, "_THREADS", 1)
    splits, storage = _examine(folder)
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["cat", "dog"])}
    features["file_name"] = tfds.features.Text()
    identity = DatasetIdentity("many", tfds.core.Version("1.0.0"), str(directory), "")
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    tfds_writer.write_dataset(info, directory, splits, storage, conversion=repr(storage), shrinks=True)


@pytest.mark.long
def test_a_killed_preparation_goes_on(
    tmp_path: Path, child_env: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, directory = tmp_path / "folder", tmp_path / "many" / "1.0.0"
    (folder / "train" / "one").mkdir(parents=True)
    for number in range(12):
        (folder / "train" / "one" / f"{number}.jpg").write_bytes(_image(number))
    child = subprocess.Popen(
        [sys.executable, "-c", _SLOW, str(folder), str(directory)], env=child_env(), stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert [child.stdout.readline().strip() for _ in range(2)] == ["written"] * 2
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    incomplete = directory.with_name(".1.0.0.incomplete")
    assert not directory.exists()
    done = {path.name: path.stat().st_mtime_ns for path in incomplete.glob("many-*")}
    assert len(done) in (2, 3)
    cut = max(done)
    (incomplete / cut).write_bytes((incomplete / cut).read_bytes()[:100])  # a disk that lost what it was given
    begin(folder, directory, monkeypatch)
    times = {path.name: path.stat().st_mtime_ns for path in directory.glob("many-*")}
    assert len(times) == 4
    assert {name for name in done if times[name] == done[name]} == set(done) - {cut}
    assert not list(directory.glob(".*"))
    builder: Any = tfds.builder("many", data_dir=tmp_path)
    examples = list(builder.as_data_source(split="train"))
    assert {example["file_name"].decode() for example in examples} == {f"one/{number}.jpg" for number in range(12)}
    assert len(examples) == 12
    assert {min(example["image"].shape[:2]) for example in examples} == {20}


def test_a_preparation_from_other_images_begins_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    splits = examined(folder)
    incomplete = tmp_path / ".1.0.0.incomplete"
    tfds_writer._begin(incomplete, splits)
    (incomplete / "shard").touch()
    tfds_writer._begin(incomplete, splits)
    assert (incomplete / "shard").exists()
    tfds_writer._begin(incomplete, splits, "smaller")
    assert not (incomplete / "shard").exists()
    (incomplete / "shard").touch()
    tfds_writer._begin(incomplete, {"train": splits["train"][:2]})
    assert "begun from other images" in caplog.text
    assert not (incomplete / "shard").exists()
    with pytest.raises(DataFault, match=r"GB free and 1000000\.00 GB are to be written"):
        check_space(tmp_path, 10**15)
