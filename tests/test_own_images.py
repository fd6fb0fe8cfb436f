"""Images of a user's own, by name: features, neighbours, predictions, pictures, by commands and in Python."""

import csv
import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from absl import flags
from etils import epath
from PIL import Image

import mae_dist
from mae_dist import cli, features, knn, predict, reconstruct
from mae_dist.errors import EXIT_DONE, ConfigError, DataFault
from mae_dist.evaluation import knn_ridge, predictions
from mae_dist.evaluation.patch_colours import patch_colours
from mae_dist.weights.convert import convert_weights
from mae_dist.weights.pretrained import open_pretrained
from tests.trained import NUM_CLASSES, in_memory, save

RNG = np.random.default_rng(0)
NAMES = [f"{'cat' if i % 2 else 'a dog'}/{i:02d}.png" for i in range(20)]
BROKEN = ["cat/broken.jpg", "empty.png"]
SMALL = {"model__depth": 1, "data__mean": (0.4, 0.5, 0.6)}


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image[..., ::-1])


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """uint8 (20, 16, 16, 3): of the model's size, so that reading them changes nothing."""
    return RNG.integers(0, 256, (len(NAMES), 16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, images: np.ndarray) -> Path:
    root = tmp_path_factory.mktemp("own") / "images"
    for name, image in zip(NAMES, images, strict=True):
        write(root / name, image)
    for name in BROKEN:
        (root / name).write_bytes(b"\xff\xd8\xff" if name.endswith("jpg") else b"")
    (root / "notes.txt").write_text("no image")
    return root


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its config names data that is not there: none is needed."""
    fields = {"data__source": "folder", "data__data_dir": "/none", **SMALL}
    return save(tmp_path_factory.mktemp("own") / "run", in_memory(**fields))


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory, images: np.ndarray) -> Path:
    root = tmp_path_factory.mktemp("own") / "classes"
    for number in range(NUM_CLASSES):
        write(root / f"class {number}" / "1.png", images[number])
    return root


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory, classes: Path) -> Path:
    fields = {"data__source": "folder", "data__data_dir": str(classes), "data__labels": "folders", **SMALL}
    source = in_memory(task="finetune", **fields, data__cache_dir=str(classes.parent / "cache"))
    return save(tmp_path_factory.mktemp("own") / "finetuned", source)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`command(module, **flags)`: what it prints, run in this process on its eight devices."""

    def run_here(module: Any, **values: Any) -> str:
        monkeypatch.setattr(cli, "join_processes", lambda: None)
        monkeypatch.setattr(cli, "given_config", lambda: None)
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        # Not by absl's flagsaver: commands share names of flags, whose defaults are not of one type in one process.
        if module is knn:
            values = {"json": False, **values}
        level, given = logging.getLogger("absl").level, {name: flags.FLAGS[name] for name in values}
        before = {name: flag.value for name, flag in given.items()}
        try:
            for name, value in values.items():
                given[name].value = str(value) if isinstance(value, Path) else value
            assert getattr(module, module.__name__.rpartition(".")[2])([]) == EXIT_DONE
        finally:
            for name, value in before.items():
                given[name].value = value
            logging.getLogger("absl").setLevel(level)
        return capsys.readouterr().out

    return run_here


def width_of(path: Path) -> int:
    with Image.open(path) as picture:
        return picture.width


def order() -> list[int]:
    """The numbers of the images in the order of their names."""
    return sorted(range(len(NAMES)), key=lambda number: NAMES[number])


# --- features


@pytest.mark.parametrize("suffix", [".npz", ".parquet", ""])
def test_features_by_name(
    command: Any, pretrained: Path, folder: Path, images: np.ndarray, tmp_path: Path, suffix: str, caplog: Any
) -> None:
    """In the order of names, as of the arrays; what does not decode is named."""
    out = tmp_path / f"features{suffix}"
    with caplog.at_level(logging.WARNING):
        said = command(features, workdir=pretrained, images=folder, out=out, kinds=["mean", "patches"], shard_size=8)
    assert said == f"{pretrained}, step 0: features of 20 images of {folder} in {out}\n"
    (skipped,) = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert skipped.startswith("skipped 2 of 22 files:")
    assert all(name in skipped for name in BROKEN)
    if suffix == ".parquet":
        table = pq.read_table(out)
        assert table.column_names == ["file", "mean", "patches"]
        columns = {name: np.array(table[name].to_pylist()) for name in table.column_names}
    else:
        paths = [out] if suffix else sorted(out.glob("*.npz"))
        parts = [dict(np.load(path, allow_pickle=False)) for path in paths]
        assert [*parts[0]] == ["file", "mean", "patches"]
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    assert columns["file"].tolist() == [NAMES[number] for number in order()]
    encoder = mae_dist.load_encoder(pretrained)
    for kind in ("mean", "patches"):
        wanted = encoder.features(images[order()], kind)
        np.testing.assert_allclose(columns[kind].reshape(wanted.shape), wanted, atol=1e-5)


def test_nothing_of_broken_files_alone(command: Any, pretrained: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(b"x")
    with pytest.raises(DataFault, match=r"none decodes.*1\.png"):
        command(features, workdir=pretrained, images=tmp_path / "images", out=tmp_path / "out.npz")
    assert os.listdir(tmp_path) == ["images"]


def test_a_glob_that_a_shell_wrote_out_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'b\.png' belongs to no flag; .*quotes"):
        cli.refuse_arguments(["features", "b.png", "c.png"])


def test_paths_in_python(pretrained: Path, folder: Path, images: np.ndarray) -> None:
    """In the order given, as often as given."""
    found = mae_dist.find_images(folder)
    assert found == sorted(str(folder / name) for name in [*NAMES, *BROKEN])
    assert mae_dist.find_images(f"{folder}/*dog,{folder / 'cat'}") == sorted(set(found) - {str(folder / "empty.png")})
    encoder = mae_dist.load_encoder(pretrained)
    chosen = [7, 3, 3, 12]
    wanted = encoder.features(images[chosen])
    np.testing.assert_array_equal(encoder.features([folder / NAMES[number] for number in chosen]), wanted)
    paths = np.array([str(folder / NAMES[number]) for number in chosen])
    np.testing.assert_allclose(encoder.features(paths, batch_size=3), wanted, atol=1e-6)
    with pytest.raises(DataFault, match=r"cat/broken\.jpg"):
        encoder.features(found)
    with pytest.raises(DataFault, match="do not exist: /none"):
        encoder.features(["/none"])
    with pytest.raises(ConfigError, match="give a list of them"):
        encoder.features(str(folder))  # pyright: ignore[reportArgumentType]


def test_the_range_of_the_model(tmp_path: Path) -> None:
    """16-bit files by the largest value that the model was trained with."""
    fields = {"data__dtype": "uint16", "data__max_value": 4095.0, "model__channels": 1, "data__mean": (0.5,)}
    encoder = mae_dist.load_encoder(save(tmp_path / "run", in_memory(model__depth=1, **fields)))
    image = RNG.integers(0, 4096, (16, 16, 1), np.uint16)
    write(tmp_path / "1.png", image)
    np.testing.assert_array_equal(encoder.features([tmp_path / "1.png"]), encoder.features(image[None]))


# --- neighbours


def test_nearest() -> None:
    """Of all similarities, sorted; none its own neighbour where it is compared with itself."""
    x, y = RNG.normal(size=(30, 8)), RNG.normal(size=(11, 8))
    x, y = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, y))
    found, similarity = knn_ridge.neighbours(x * 3, y, 4)
    np.testing.assert_array_equal(found, np.argsort(-(y @ x.T), axis=1)[:, :4])
    np.testing.assert_allclose(similarity, -np.sort(-(y @ x.T), axis=1)[:, :4], atol=1e-6)
    found, _ = knn_ridge.neighbours(x, k=99)
    assert [sorted({*row, i}) for i, row in enumerate(found.tolist())] == [list(range(30))] * 30


def test_neighbours_in_python(pretrained: Path, folder: Path, images: np.ndarray) -> None:
    """Files are read as the encoder sees them; those that do not decode are found, with the reason."""
    paths = mae_dist.find_images(folder)
    broken = mae_dist.find_broken(paths)
    assert sorted(os.path.relpath(path, folder) for path in broken) == BROKEN
    assert broken[str(folder / "empty.png")] == "it is empty or gone"
    assert broken[str(folder / "cat/broken.jpg")]
    good = [path for path in paths if path not in broken]
    assert mae_dist.find_broken(good) == {}
    encoder = mae_dist.load_encoder(pretrained)
    np.testing.assert_array_equal(mae_dist.read_images(good, (16, 16)), images[order()])
    assert mae_dist.read_images(good[:1], (8, 4), channels=1).shape == (1, 8, 4, 1)
    for read in (mae_dist.find_broken, lambda paths: mae_dist.read_images(paths, (16, 16))):
        with pytest.raises(ConfigError, match=r"give a list of .*mae_dist\.find_images"):
            read(str(folder))
    found, similarity = mae_dist.neighbours(encoder.features(good), k=3)
    assert found.shape == similarity.shape == (20, 3)
    assert (found != np.arange(20)[:, None]).all()
    colours = mae_dist.patch_colours(encoder.features(good[:2], "patches"))
    assert colours.shape == (2, *encoder.grid, 3)


def test_files_of_a_run(pretrained: Path, classes: Path, finetuned: Path) -> None:
    """A split's by path, those that do not decode too; only of a folder."""
    run = mae_dist.open_run(finetuned)
    with pytest.raises(ConfigError, match="there is no split 'all'"):
        run.files("all")
    splits = ("train", "val")
    given = run.config.copy_and_resolve_references().unlock()
    given.data.train_split, given.data.val_split = splits
    run = dataclasses.replace(run, config=given)
    found = [set(run.files(split)) for split in splits]
    assert found[0] | found[1] == {str(path) for path in classes.rglob("*.png")}
    assert found[0]
    assert not found[0] & found[1]
    with pytest.raises(DataFault, match="does not exist"):
        mae_dist.open_run(pretrained).files("train")


def test_neighbours_by_name(command: Any, pretrained: Path, folder: Path, images: np.ndarray, tmp_path: Path) -> None:
    said = command(knn, workdir=pretrained, images=folder, k=3, out=tmp_path / "n.png").splitlines()
    lines = dict(line.split(": ", 1) for line in said[:20])
    assert [*lines] == [NAMES[number] for number in order()]
    computed = mae_dist.load_encoder(pretrained).features(images)
    found, _ = knn_ridge.neighbours(computed, k=3)
    for number, near in enumerate(found):
        assert [text.rpartition(" (")[0] for text in lines[NAMES[number]].split(", ")] == [NAMES[i] for i in near]
    assert "12 of 22 queries" in said[20]
    assert width_of(tmp_path / "n.png") > 4 * 100
    query = folder / NAMES[4]
    one = command(knn, workdir=pretrained, images=query, against=folder, kind="cls")
    assert one.startswith(f"04.png: {NAMES[4]} (1.00), ")
    with pytest.raises(ConfigError, match="is one image; say by --against"):
        command(knn, workdir=pretrained, images=query)
    with pytest.raises(ConfigError, match="give these too"):
        command(knn, workdir=pretrained, against=folder)


def test_accuracy_needs_classes(command: Any, folder: Path, tmp_path: Path) -> None:
    fields = {"data__source": "folder", "data__data_dir": str(folder), "data__test_split": "", **SMALL}
    trained = save(tmp_path / "run", in_memory(**fields, data__cache_dir=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"labels of 0 classes.*--images"):
        command(knn, workdir=trained)


# --- predictions


def test_predictions_by_name(
    command: Any,
    finetuned: Path,
    folder: Path,
    images: np.ndarray,
    classes: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A row for each, or several; the classes by the names of the training data, by numbers if these are gone."""
    run = mae_dist.open_run(finetuned)
    wanted = run.predict(images[order()])
    assert wanted.shape == (20, NUM_CLASSES)
    np.testing.assert_allclose(wanted.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(run.predict([folder / NAMES[i] for i in order()]), wanted, atol=1e-6)
    with jax.log_compiles(), caplog.at_level("WARNING", "jax"):
        np.testing.assert_allclose(run.predict(images[order()[:17]]), wanted[:17], atol=1e-6)
        assert "Compiling" not in caplog.text
        np.testing.assert_allclose(run.predict(images[order()[:3]]), wanted[:3], atol=1e-6)
        assert "Compiling" in caplog.text
    assert run.class_names == tuple(f"class {number}" for number in range(NUM_CLASSES))
    said = command(predict, workdir=finetuned, images=folder, out=tmp_path / "p.csv", top=2)
    with open(tmp_path / "p.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [NAMES[i] for i in order() for _ in range(2)]
    likely = np.argsort(-wanted, axis=1)[:, :2]
    assert [row["class"] for row in rows] == [f"class {number}" for number in likely.ravel()]
    found = np.array([float(row["probability"]) for row in rows]).reshape(-1, 2)
    np.testing.assert_allclose(found, np.take_along_axis(wanted, likely, axis=1), atol=1e-5)
    most = np.bincount(likely[:, 0]).argmax()
    assert said.startswith(f"{finetuned}, step 0: 20 images in {tmp_path / 'p.csv'}; class {most}: ")
    with pytest.raises(DataFault, match=r"2 of 22 files do not decode: .*cat/broken\.jpg"):
        run.predict(mae_dist.find_images(folder))
    classes.rename(classes.with_name("away"))
    try:
        assert mae_dist.open_run(finetuned).class_names == tuple(map(str, range(NUM_CLASSES)))
    finally:
        classes.with_name("away").rename(classes)


def test_predictions_hold_no_formulas(command: Any, images: np.ndarray, tmp_path: Path) -> None:
    """Names come from whoever made the images or the model; a file's still leads to it."""
    for number in range(NUM_CLASSES):
        write(tmp_path / "classes" / f"{'=+-@'[number % 4]}1+{number}" / "1.png", images[number])
    names = ["=1.png", "@b.png", "a=1.png"]
    for number, name in enumerate(names):
        write(tmp_path / "images" / name, images[number])
    fields = {"data__source": "folder", "data__data_dir": str(tmp_path / "classes"), "data__labels": "folders", **SMALL}
    source = in_memory(task="finetune", **fields, data__cache_dir=str(tmp_path / "cache"))
    given = {"images": tmp_path / "images", "out": tmp_path / "p.csv"}
    command(predict, workdir=save(tmp_path / "model", source), **given)
    with open(tmp_path / "p.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == ["./=1.png", "./@b.png", "a=1.png"]
    assert all((tmp_path / "images" / row["file"]).exists() for row in rows)
    assert all(row["class"].startswith(("'=1+", "'+1+", "'-1+", "'@1+")) for row in rows)


def test_a_pretraining_has_no_classes(command: Any, pretrained: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no classifier.* --config\.task=finetune"):
        command(predict, workdir=pretrained, images=folder, out=tmp_path / "p.csv")
    assert mae_dist.open_run(pretrained).class_names == ()
    with pytest.raises(ConfigError, match="no classifier"):
        mae_dist.open_run(pretrained).predict([folder / NAMES[0]])


# --- pictures


@pytest.mark.long
def test_pictures_by_name(
    command: Any, pretrained: Path, finetuned: Path, folder: Path, images: np.ndarray, tmp_path: Path
) -> None:
    """Reconstructions and patch features; of a classifier the latter alone; nothing else of it."""
    out = tmp_path / "r.png"
    said = command(reconstruct, workdir=pretrained, images=folder, out=out, pca=True, num_images=4)
    assert said == f"{pretrained}, step 0: 4 of 22 images of {folder} in {out}\n"
    both = width_of(out)
    command(reconstruct, workdir=pretrained, images=folder, out=out, num_images=4)
    assert width_of(out) == both * 4 // 5
    command(reconstruct, workdir=finetuned, images=folder, out=out, num_images=4, pca=True)
    assert width_of(out) == both * 2 // 5
    with pytest.raises(ConfigError, match=r"is a finetune: it has no decoder; .*--pca"):
        command(reconstruct, workdir=finetuned, images=folder, out=out)
    drawn = mae_dist.open_run(pretrained).reconstruct([folder / name for name in NAMES[:3]])
    np.testing.assert_allclose(drawn["original"], images[:3] / 255, atol=1e-6)


def test_colours_of_patches() -> None:
    """The directions of largest variance, whatever their sign; the patches of an image in their places."""
    scores = RNG.normal(size=(2, 3, 4, 3)) * (9, 3, 1)
    axes = np.linalg.qr(RNG.normal(size=(6, 6)))[0][:3]
    axes *= np.sign(np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1))
    scores -= scores.mean(axis=(0, 1, 2))
    u, s, vt = np.linalg.svd(scores.reshape(-1, 3), full_matrices=False)
    del s, vt
    scores = u.reshape(scores.shape) * (9, 3, 1)  # uncorrelated: the axes are the principal ones
    found = patch_colours((scores @ axes + 5).astype(np.float32), (2, 5))
    assert (found.shape, found.dtype) == ((2, 6, 20, 3), np.float32)
    low, high = np.percentile(scores.reshape(-1, 3), (1, 99), axis=0)
    wanted = np.clip((scores - low) / (high - low), 0, 1)
    np.testing.assert_allclose(found[:, ::2, ::5], wanted, atol=1e-3)
    np.testing.assert_array_equal(found[:, ::2, ::5], found[:, 1::2, 4::5])
    for value in (1, np.nan):
        assert (patch_colours(np.full((1, 2, 2, 8), value, np.float32), (1, 1)) == 0.5).all()


def test_devices_stay_once_there_are_some(child_env: Any) -> None:
    """A run may be opened where JAX has been used: it then takes the devices that there are."""
    env = {name: value for name, value in child_env().items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    program = "import jax; jax.devices(); from mae_dist.cpu import start; start.use_all_cores(None)"
    subprocess.run([sys.executable, "-c", program], env=env, check=True, timeout=120)


def test_names_in_a_directory_of_hugging_face(tmp_path: Path) -> None:
    """In the order of their numbers; it says nothing of data."""
    source = in_memory(task="finetune", classify__pool="cls", **SMALL)
    convert_weights(source, epath.Path(tmp_path / "hf"), "hf")
    path = tmp_path / "hf" / "config.json"
    described = json.loads(path.read_text())
    described["id2label"] = {str(i): f"class {i}" for i in reversed(range(NUM_CLASSES))}
    path.write_text(json.dumps(described))
    found = open_pretrained(epath.Path(tmp_path / "hf"))
    assert predictions.class_names(found) == tuple(f"class {i}" for i in range(NUM_CLASSES))
