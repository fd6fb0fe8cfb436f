"""The command that writes features: every readable image once, whoever computes it, and a whole directory or none."""

import json
import os
import signal
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from absl import flags
from absl.testing import flagsaver

import mae_dist
from mae_dist import cli, features
from mae_dist.data import ArrayDataset
from mae_dist.data import from_config as data_from_config
from mae_dist.errors import ConfigError, DataFault, StorageFault
from tests.runs import free_port, smoke_config, start
from tests.trained import in_memory, save

# 102 examples to test: no multiple of a batch or a shard here.
FIELDS = {"data__num_examples": 510, "eval__batch_size": 32}
ARGS = ("--config=configs/smoke.py", "--config.data.num_examples=510", "--config.eval.batch_size=32")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Where the weights are."""
    source = in_memory(**FIELDS, model__depth=1, data__mean=(0.4, 0.5, 0.6))
    return save(tmp_path_factory.mktemp("features") / "run", source)


@pytest.fixture(scope="module")
def wanted(trained):
    """Labels and features of the test split from one device, all at once."""
    config = smoke_config(**FIELDS)
    examples = data_from_config.open_dataset(config, config.data.test_split).examples(np.arange(102))
    encoder = mae_dist.load_encoder(trained)
    computed = {"mean": encoder.features(examples["image"]), "patches": encoder.features(examples["image"], "patches")}
    return {"index": np.arange(102, dtype=np.int32), **labels(config, examples["label"]), **computed}


def labels(config, numbers):
    """The columns of labels: numbers and names."""
    names = data_from_config.open_dataset(config, "train").class_names
    return {"label": numbers, "class": np.array([names[number] for number in numbers])}


@pytest.fixture
def compute(trained, monkeypatch):
    """`compute(out, config, **flags)`: runs the command in this process, on its eight devices; its exit code."""

    def run_here(out, config=None, /, **values):
        monkeypatch.setattr(cli, "join_processes", lambda: None)
        monkeypatch.setattr(cli, "given_config", lambda: config)
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        with flagsaver.flagsaver(**{"workdir": str(trained), "out": str(out), **values}):
            return features.features([])

    return run_here


def read(directory):
    """(what features.json says, every column of all shards in order)."""
    description = json.loads((directory / "features.json").read_text())
    assert sorted(path.name for path in directory.iterdir()) == sorted(
        ["features.json", *(file["name"] for file in description["files"])]
    )
    shards = []
    for file in description["files"]:
        if file["name"].endswith(".npz"):
            with np.load(directory / file["name"], allow_pickle=False) as shard:
                shards.append(dict(shard))
        else:
            table = pq.read_table(directory / file["name"])
            shards.append({name: np.array(table[name].to_pylist()) for name in table.column_names})
        assert {len(column) for column in shards[-1].values()} == {file["count"]}
    columns = {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}
    for kind, shape in description["shapes"].items():
        columns[kind] = columns[kind].reshape(-1, *shape)
    return description, columns


def assert_columns(found, wanted):
    """Exactly these columns, features to float tolerance."""
    assert found.keys() == wanted.keys()
    for name, column in wanted.items():
        if name == "class":
            assert found[name].tolist() == column.tolist()
            continue
        np.testing.assert_allclose(found[name], column, rtol=1e-5, atol=1e-5, err_msg=name)


# --- what is written


def test_every_image_once_and_in_order(compute, trained, wanted, tmp_path, capsys):
    """Padding of the last batch left out, shards of the promised size; the description is true."""
    out = tmp_path / "new" / "out"
    assert compute(out, kinds=["mean", "patches"], shard_size=40) == 0
    assert capsys.readouterr().out == f"{trained}, step 0: features of 102 images of test in {out}\n"
    description, columns = read(out)
    assert_columns(columns, wanted)
    assert {name: column.dtype for name, column in columns.items() if name != "class"} == {
        "index": np.int32,
        "label": np.int32,
        "mean": np.float32,
        "patches": np.float32,
    }
    assert description == {
        "encoder": f"{trained}, step 0",
        "data": {"source": "synthetic", "name": "shapes", "split": "test"},
        "block": None,
        "shapes": {"mean": [32], "patches": [4, 4, 32]},
        "count": 102,
        "class_names": list(data_from_config.open_dataset(smoke_config(**FIELDS), "test").class_names),
        "files": [{"name": f"0000{i}.npz", "count": count} for i, count in enumerate((40, 40, 22))],
    }
    assert os.listdir(out.parent) == ["out"]


def test_parquet_and_a_split_model(compute, wanted, tmp_path):
    """The other format holds the same, and the names of the classes; so does a mesh that splits weights and rows.

    The pixels are scaled as the model knows it, whatever a config for data and mesh says.
    """
    config = smoke_config(data__num_examples=510, mesh__fsdp=2, mesh__tensor=2, global_batch_size=26)
    assert compute(tmp_path / "out", config, kinds=["mean", "patches"], format="parquet", shard_size=51) == 0
    description, columns = read(tmp_path / "out")
    assert [file["count"] for file in description["files"]] == [51, 51]
    assert_columns(columns, wanted)


def test_less_than_a_batch_of_another_split(compute, trained, tmp_path):
    """A split expression, what enters a block, and a batch size that the devices do not divide."""
    config = smoke_config(**{**FIELDS, "eval__batch_size": 9})
    assert compute(tmp_path / "out", config, split="train[5:12]", block=0, shard_size=7) == 0
    description, columns = read(tmp_path / "out")
    assert (description["block"], description["data"]["split"]) == (0, "train[5:12]")
    examples = data_from_config.open_dataset(config, "train[5:12]").examples(np.arange(7))
    wanted = mae_dist.load_encoder(trained).features(examples["image"], block=0)
    assert_columns(columns, {"index": np.arange(7), **labels(config, examples["label"]), "mean": wanted})


class SomeUnreadable(ArrayDataset):
    """Examples 3 and 4 behave as records that do not decode."""

    max_bad_share = 0.1

    def read(self, indices, crops=None, evaluation=True):
        columns, _ = super().read(indices, crops, evaluation)
        return columns, np.isin(indices, (3, 4))


def test_unreadable_images_are_left_out(compute, tmp_path, monkeypatch):
    """The others keep their numbers; more than config.data allows are a fault, and nothing is left behind."""
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)
    dataset = SomeUnreadable({"image": images, "label": np.arange(20, dtype=np.int32) % 10}, num_classes=10)
    monkeypatch.setattr(features, "open_dataset", lambda config, split: dataset)
    assert compute(tmp_path / "out", shard_size=10, block=0) == 0
    description, columns = read(tmp_path / "out")
    assert description["count"] == 18
    assert [file["count"] for file in description["files"]] == [10, 8]
    np.testing.assert_array_equal(columns["index"], [i for i in range(20) if i not in (3, 4)])
    np.testing.assert_array_equal(columns["label"], columns["index"] % 10)
    dataset.max_bad_share = 0.05
    with pytest.raises(DataFault, match="max_bad_share"):
        compute(tmp_path / "other", block=0)
    assert os.listdir(tmp_path) == ["out"]


# --- nothing or all of it


def test_a_full_disk_leaves_nothing(compute, tmp_path, monkeypatch):
    """A fault in the middle takes away what was written before it."""
    write = features._write

    def fill_up(path, *args):
        if path.name != "00000.npz":
            raise OSError(28, "No space left on device")
        write(path, *args)

    monkeypatch.setattr(features, "_write", fill_up)
    with pytest.raises(StorageFault, match=r"out.*No space left"):
        compute(tmp_path / "out", shard_size=20, block=0)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"workdir": ""}, "--workdir is missing"),
        ({"workdir": "/none"}, "/none does not exist"),
        ({"out": ""}, "--out is missing"),
        ({"out": "gs://bucket/out"}, "write to a local path"),
        ({"split": "val"}, r"--split=val: data.val_split is ''; name a split expression"),
        ({"split": "test[:0]"}, "selects no example"),
        ({"split": "validation"}, "is not one of train, test"),
        ({"kinds": []}, "--kinds is missing"),
        ({"kinds": ["mean", "max"]}, "no 'max' features; choose of mean, cls, patches"),
        ({"block": 2}, "block 2: the encoder has blocks 1 to 1"),
    ],
)
def test_wrong_flags_are_refused(compute, tmp_path, values, words):
    """One message with the cure, code 2, and nothing left behind."""
    with pytest.raises(ConfigError, match=words) as error:
        compute(tmp_path / "out", smoke_config(**FIELDS, data__val_split=""), **values)
    assert error.value.exit_code == 2
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"eval.batch_size": -8}, "batch of -8"),
        ({"eval.batch_size": 0, "global_batch_size": 0}, "batch of 0"),
        ({"mesh.data": 3}, "3 devices"),
        ({"mesh.tensor": 8}, "does not divide by mesh.tensor=8"),
    ],
)
def test_configs_that_cannot_work_are_refused(compute, tmp_path, fields, words):
    """Not an empty directory, nor a traceback."""
    config = smoke_config(**FIELDS)
    config.update_from_flattened_dict(fields)
    with pytest.raises(ConfigError, match=words):
        compute(tmp_path / "out", config)
    assert os.listdir(tmp_path) == []


def test_what_exists_is_not_touched(compute, tmp_path):
    """Neither a directory of features nor anything else."""
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match="out exists already"):
        compute(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


# --- real processes


@pytest.mark.long
def test_two_processes_write_what_one_does(child_env, trained, wanted, tmp_path):
    """The command line itself; the first process writes and reports."""
    out = tmp_path / "out"
    args = (f"--workdir={trained}", *ARGS, "--kinds=mean,patches", "--shard_size=40", f"--out={out}")
    where = (f"--coordinator_address=127.0.0.1:{free_port()}", "--num_processes=2")
    processes = [start(child_env(), *args, *where, f"--process_id={i}", module="features") for i in range(2)]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    line = f"{trained}, step 0: features of 102 images of test in {out}"
    assert [line in output.splitlines() for output in outputs] == [True, False]
    description, columns = read(out)
    assert [file["count"] for file in description["files"]] == [40, 40, 22]
    assert_columns(columns, wanted)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.long
def test_a_kill_leaves_no_directory(child_env, trained, tmp_path):
    """What is half written cannot be taken for features."""
    many = ("--config=configs/smoke.py", "--config.data.num_examples=500000", "--shard_size=1", "--block=0")
    process = start(child_env(), f"--workdir={trained}", *many, f"--out={tmp_path / 'out'}", module="features")
    while not list(tmp_path.glob(".out.*/00002.npz")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".out.")] == []
