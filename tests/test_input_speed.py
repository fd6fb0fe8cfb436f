"""The input pipeline measured alone and against PyTorch's, which reads the same records."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import default
from mae_dist.benchmark import inputs, steps, turns
from mae_dist.data.batches import Batches, HostBatch
from mae_dist.data.from_config import open_data, open_dataset
from mae_dist.data.sources.tfds import TfdsDataset
from mae_dist.data.transforms import CROP_UNIFORMS, RandomCrops
from mae_dist.errors import EXIT_CONFIG, ConfigError, DataFault
from mae_dist.training import job
from tests import NO_PARITY
from tests.comparators import torch_input
from tests.conftest import ROOT
from tests.test_tfds import prepare_shapes


@pytest.fixture
def config(tmp_path: Path) -> ConfigDict:
    prepare_shapes(tmp_path, sizes=[(40 + 7 * i, 90 - 5 * i) for i in range(12)], fixed=False)
    config = default.get_config()
    config.data.update(name="shapes", data_dir=str(tmp_path), train_split="train", augment="crop_flip")
    config.global_batch_size = 8
    return config


def test_the_other_pipeline_makes_the_same_of_the_same_records(config: ConfigDict, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason=NO_PARITY)
    # Of square images all of the area is all of the image, so that both have the same crop.
    prepare_shapes(tmp_path / "square", sizes=[(40 + 7 * i, 40 + 7 * i) for i in range(12)], fixed=False)
    config.data.update(data_dir=str(tmp_path / "square"), crop_scale=(1.0, 1.0))
    config.model.image_size = (24, 16)
    dataset = open_dataset(config, "train")
    assert isinstance(dataset, TfdsDataset)
    options = inputs._torch_options(config, dataset)
    others = torch_input.Records(options["spans"], options["image_size"], options["mode"], options["scale"])
    assert len(others) == 12
    uniforms = np.random.default_rng(0).random((12, CROP_UNIFORMS))
    mine = dataset.examples(np.arange(12), RandomCrops(uniforms, (1.0, 1.0)))
    for index, label in enumerate(mine["label"]):
        image, other_label = others[index]
        assert image.shape == (3, 24, 16)
        assert other_label == label
        pixels = image.permute(1, 2, 0).numpy().astype(float)
        flips = (pixels, pixels[:, ::-1])
        assert min(np.abs(flip - mine["image"][index]).mean() for flip in flips) < 2
    for _ in range(200):
        left, top, right, bottom = torch_input.crop_box(30, 20, [0.2, 1.0])
        assert 0 <= left < right <= 30
        assert 0 <= top < bottom <= 20


@pytest.mark.long
def test_both_are_measured_by_turns_and_stopped_between(config: ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason=NO_PARITY)
    run = turns.Child.run
    names = []

    def watched(self: turns.Child, count: int) -> float:
        seconds = run(self, count)
        names.append(self.name)
        deadline = time.monotonic() + 20
        while not all(_is_stopped(process) for process in turns.processes_of(self.process.pid)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return seconds

    monkeypatch.setattr(turns.Child, "run", watched)
    result = inputs.measure(config, against_torch=True, repeats=2, secs=0.05)
    assert names == ["mae_dist", "torch"] * 3
    assert result["images_per_sec"] > 0
    assert result["ratio"] > 0
    assert result["torch_worker_peak_mib"] > 10
    assert 10 < result["main_peak_mib"] < 2000
    for other in ({"augment": "none"}, {"randaug_magnitude": 9.0}, {"repeats": 2}):
        changed = config.copy_and_resolve_references()
        changed.data.update(other)
        with pytest.raises(ConfigError, match="--against torch compares decoding and random crops"):
            inputs.measure(changed, against_torch=True, repeats=1, secs=0.05)


def test_a_long_trial_tells_speed_and_memory_again_and_again(config: ConfigDict) -> None:
    lines = list(inputs.watch(config, minutes=0.01))
    assert lines[-1]["minutes"] >= 0.01
    assert min(line["images_per_sec"] for line in lines) > 0
    assert min(line["total_mib"] for line in lines) > 10


def test_a_pipeline_that_ends_is_told(config: ConfigDict) -> None:
    with inputs.pipelines(config, against_torch=False) as (pipeline,):
        os.killpg(pipeline.process.pid, signal.SIGKILL)
        with pytest.raises(DataFault, match="mae_dist ended with code -9"):
            pipeline.run(1)


def test_what_is_measured_is_what_trains(config: ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:
    config.data.update(randaug_magnitude=9.0, repeats=2)
    taken = []
    take = Batches.__next__

    def noted(self: Batches) -> HostBatch:
        taken.append(take(self))
        return taken[-1]

    monkeypatch.setattr(Batches, "__next__", noted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("2\n"))
    inputs.serve(config)
    built = job.build(config, jax.devices(), open_data(config))
    with built.train_batches(built.data.train, 0, np.arange(8)) as batches:
        expected = [take(batches) for _ in range(3)]
    for batch, same in zip(taken, expected, strict=True):
        np.testing.assert_array_equal(batch["image"], same["image"])
        np.testing.assert_array_equal(batch["label"][:4], batch["label"][4:])


@pytest.mark.long
def test_the_files_may_be_many(config: ConfigDict) -> None:
    pytest.importorskip("torch", reason=NO_PARITY)
    dataset = open_dataset(config, "train")
    options = inputs._torch_options(config, dataset)
    options["spans"] *= 1 + (1 << 17) // len(options["spans"][0])  # more than an argument of a command may hold
    pipeline = turns.Child("torch", (turns.comparator("torch_input"),), options)
    try:
        assert pipeline.run(1) > 0
    finally:
        pipeline.close()


def test_what_an_installed_package_lacks_is_named(config: ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "__file__", "/nowhere/mae_dist/benchmark/turns.py")
    words = r"which is in a clone and not in the installed package: clone .*parity"
    with pytest.raises(ConfigError, match=words):
        inputs.measure(config, against_torch=True, repeats=1, secs=0.05)
    with pytest.raises(ConfigError, match=words):
        steps.measure(config, "train", against_hf=True, repeats=1, secs=0.05)


@pytest.mark.parametrize("flags", ["--what=input --scaling", "--what=input --minutes=1 --against=torch"])
def test_flags_that_exclude_each_other_are_refused(flags: str, child_env: Callable[..., dict[str, str]]) -> None:
    command = [sys.executable, "-m", "mae_dist.benchmark", "--config=configs/smoke.py", *flags.split()]
    done = subprocess.run(command, env=child_env(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_CONFIG, done.stderr
    assert "leave" in done.stderr


def _is_stopped(process: int) -> bool:
    """Or ended, and not yet waited for."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "TZ"
