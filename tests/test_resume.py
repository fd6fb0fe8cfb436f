"""Killed runs continue as if nothing had happened: real processes, SIGKILL, real files."""

import json
import shutil
import signal
import time

import numpy as np
import pytest

from mae_dist.errors import EXIT_PREEMPTED
from tests import trained
from tests.runs import (
    ONLY_UPDATES,
    checkpoint_arrays,
    kill_at_step,
    last_step,
    records,
    run,
    start,
    wait_for_step,
    wait_within_save,
)

ARGS = (
    "--config=configs/smoke.py",
    "--config.total_steps=60",
    "--config.log_every_steps=1",
    "--config.checkpoint.every_steps=7",
    "--config.eval.every_steps=20",
    "--config.pictures.every_epochs=0",
    "--config.pictures.every_steps=0",
    "--config.data.augment=crop_flip",
    "--config.model.drop_path=0.1",
    "--config.ema_decay=0.9",
)


@pytest.fixture(scope="module")
def uninterrupted(child_env, tmp_path_factory):
    """A run of 60 updates, several epochs of 12.8 updates each, never killed."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    code, output = run(child_env(), *ARGS, f"--workdir={workdir}")
    assert code == 0, output
    return workdir


def assert_same(workdir, other):
    assert records(workdir) == records(other)
    for a, b in zip(checkpoint_arrays(workdir), checkpoint_arrays(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "kills",
    [pytest.param(((15, 25),), id="once"), pytest.param(((15, 25), (30, 55)), id="twice", marks=pytest.mark.long)],
)
def test_killed_is_bit_equal(uninterrupted, child_env, tmp_path, draw, kills):
    """Parameters, moments and every metric equal; no step twice, none missing; also with worker processes.

    The save at step 14 has waited until the one at step 7 was on disk, however slow the machine.
    """
    workdir = tmp_path / "run"
    args = (*ARGS, "--config.data.num_workers=2", f"--workdir={workdir}")
    for first, last in kills:
        step = draw.randint(first, last)
        kill_at_step(start(child_env(), *args), workdir, step)
    code, output = run(child_env(), *args)
    assert code == 0, output
    assert "Continuing from step" in output
    assert [record["step"] for record in records(workdir)] == list(range(1, 61))
    assert_same(workdir, uninterrupted)


CLASSIFIERS = {
    # Images augmented, so that features are computed anew; the running statistics are no parameters that are trained.
    "probe": (
        "--config.task=probe",
        "--config.classify.batch_norm=True",
        "--config.classify.pool=cls",
        "--config.optim.name=lars",
        "--config.optim.base_lr=0.1",
        "--config.optim.weight_decay=0.0",
    ),
    "finetune": (
        "--config.task=finetune",
        "--config.classify.norm_after_pool=True",
        "--config.classify.label_smoothing=0.1",
        "--config.classify.mixup=0.8",
        "--config.classify.cutmix=1.0",
        "--config.classify.erase_prob=0.25",
        "--config.optim.layer_decay=0.75",
        "--config.model.drop_path=0.1",
        "--config.ema_decay=0.9",
    ),
}


@pytest.mark.parametrize("task", list(CLASSIFIERS))
@pytest.mark.long
def test_killed_classifier_is_bit_equal(child_env, tmp_path, draw, task):
    """What only they have goes on too: the momentum of trust ratios, running statistics, averages, pairs to mix."""
    encoder = trained.save(tmp_path / "encoder", trained.in_memory())
    args = (
        "--config=configs/smoke.py",
        *ONLY_UPDATES,
        *CLASSIFIERS[task],
        f"--config.init_from={encoder}",
        "--config.total_steps=40",
        "--config.log_every_steps=1",
        "--config.checkpoint.every_steps=5",
        "--config.data.augment=crop_flip",
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, output = run(child_env(), *args, f"--workdir={whole}")
    assert code == 0, output
    kill_at_step(start(child_env(), *args, f"--workdir={killed}"), killed, draw.randint(15, 25))
    code, output = run(child_env(), *args, f"--workdir={killed}")
    assert code == 0, output
    assert "Continuing from step" in output
    assert [record["step"] for record in records(killed)] == list(range(1, 41))
    assert_same(killed, whole)


@pytest.mark.parametrize(
    "kills",
    [pytest.param(((6, 20),), id="once"), pytest.param(((6, 20), (25, 45)), id="twice", marks=pytest.mark.long)],
)
def test_killed_within_saves(uninterrupted, child_env, tmp_path, draw, kills):
    """At a random byte count of a save: what is there goes on, and nothing differs in the end."""
    workdir = tmp_path / "run"
    args = (*ARGS, "--config.checkpoint.every_steps=2", f"--workdir={workdir}")
    for first, last in kills:
        step = draw.randint(first, last)
        process = start(child_env(), *args)
        wait_for_step([process], workdir, step)
        assert wait_within_save([process], workdir, draw.randrange(400_000))
        process.kill()
        process.communicate(timeout=20)
    code, output = run(child_env(), *args)
    assert code == 0, output
    assert "Continuing from step" in output
    assert_same(workdir, uninterrupted)


@pytest.mark.long
def test_killed_before_the_first_checkpoint_starts_again(uninterrupted, child_env, tmp_path):
    """Metrics of steps that were never saved are dropped, not repeated."""
    workdir = tmp_path / "run"
    kill_at_step(start(child_env(), *ARGS, f"--workdir={workdir}"), workdir, 2)
    shutil.rmtree(workdir / "checkpoints")
    code, output = run(child_env(), *ARGS, f"--workdir={workdir}")
    assert code == 0, output
    assert_same(workdir, uninterrupted)


@pytest.mark.long
def test_preempted_before_the_first_update(uninterrupted, child_env, tmp_path):
    """SIGTERM while it waits for data or compiles, twice: saved, or nothing was there yet; its own code; it goes on."""
    workdir = tmp_path / "run"
    args = (*ARGS, "--config.checkpoint.every_steps=0", f"--workdir={workdir}")
    process = start(child_env(), *args)
    deadline = time.monotonic() + 120
    while not (workdir / "config.json").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run does not begin"
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_PREEMPTED, output
    saved = last_step(workdir)
    if saved:
        assert f"Preempted: saved step {saved};" in output
        assert [path.name for path in (workdir / "checkpoints").iterdir()] == [str(saved)]
        assert (workdir / "seals" / f"{saved}.json").exists()
    else:
        assert "Preempted before there was anything to save" in output
    code, output = run(child_env(), *args)
    assert code == 0, output
    assert not saved or f"Continuing from step {saved} " in output
    assert_same(workdir, uninterrupted)


@pytest.mark.long
def test_finished_run_is_left_alone(uninterrupted, child_env):
    """The same line once more reports the result and changes nothing."""
    names = ("metrics.jsonl", "summary.json")
    before = [(uninterrupted / name).read_bytes() for name in names]
    code, output = run(child_env(), *ARGS, f"--workdir={uninterrupted}")
    assert code == 0, output
    assert "smoke: step 60 of 60" in output
    assert [(uninterrupted / name).read_bytes() for name in names] == before
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert summary["step"] == 60
    assert summary["test_loss"] == records(uninterrupted)[-1]["test_loss"]


def test_other_config_is_refused_field_by_field(uninterrupted, child_env, tmp_path):
    """Nothing is trained, nothing changed; the difference is named."""
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    before = (workdir / "metrics.jsonl").read_bytes()
    code, output = run(
        child_env(), *ARGS, f"--workdir={workdir}", "--config.model.mask_ratio=0.5", "--config.optim.base_lr=0.002"
    )
    assert code == 5, output
    assert "model.mask_ratio: 0.75 -> 0.5" in output
    assert "optim.base_lr: 0.001 -> 0.002" in output
    assert "Traceback" not in output
    assert (workdir / "metrics.jsonl").read_bytes() == before


@pytest.mark.long
def test_killed_with_a_sharded_state_is_bit_equal(child_env, tmp_path):
    """Each of two devices has half of the moments, of two optimizers, and averages; a checkpoint joins them."""
    optim = {"shard_state": True, "grad_exchange": "bfloat16", "name": "muon"}
    options = (*(f"--config.optim.{field}={value}" for field, value in optim.items()), "--config.total_steps=30")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, output = run(child_env(2), *ARGS, *options, f"--workdir={whole}")
    assert code == 0, output
    kill_at_step(start(child_env(2), *ARGS, *options, f"--workdir={killed}"), killed, 16)
    code, output = run(child_env(2), *ARGS, *options, f"--workdir={killed}")
    assert code == 0, output
    assert_same(killed, whole)


@pytest.mark.long
def test_continues_on_another_mesh(uninterrupted, child_env, tmp_path):
    """Begun on eight devices, continued on four, ended on one: the same examples under the same masks."""
    workdir = tmp_path / "run"
    for devices, (data, fsdp, tensor), step in ((8, (2, 2, 2), 16), (4, (1, 4, 1), 40)):
        mesh = (f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}", f"--config.mesh.tensor={tensor}")
        state = f"--config.optim.shard_state={data > 1}"
        kill_at_step(start(child_env(devices), *ARGS, *mesh, state, f"--workdir={workdir}"), workdir, step)
    code, output = run(child_env(), *ARGS, f"--workdir={workdir}")
    assert code == 0, output
    assert "Continuing with a changed field: mesh.fsdp: 4 -> 1" in output
    ours, theirs = records(workdir), records(uninterrupted)
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    np.testing.assert_allclose([r["loss"] for r in ours], [r["loss"] for r in theirs], rtol=1e-5)
