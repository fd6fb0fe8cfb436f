"""Several real processes of one run on this machine, joined by jax.distributed."""

import json

import numpy as np
import pytest
from etils import epath

import mae_dist
from mae_dist.checkpoint import digests
from tests.runs import end_of, records, run, start_processes

ARGS = (
    "--config=configs/smoke.py",
    "--config.total_steps=20",
    "--config.log_every_steps=1",
    "--config.checkpoint.every_steps=8",
    "--config.eval.every_steps=10",
    "--config.data.num_examples=500",  # no multiple of the batch: 100 for validation, 100 to test
    "--config.pictures.every_steps=20",
)


def run_processes(env, workdir, count, *args):
    """Runs `count` processes of one run to their end; their outputs."""
    ended = end_of(start_processes(env, count, *ARGS, *args, f"--workdir={workdir}"))
    outputs = [output for _, output in ended]
    assert [code for code, _ in ended] == [0] * count, "\n".join(outputs)
    return outputs


@pytest.fixture(scope="module")
def alone(child_env, tmp_path_factory):
    """The run of one process."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    code, output = run(child_env(), *ARGS, f"--workdir={workdir}")
    assert code == 0, output
    return workdir


@pytest.mark.long
def test_two_processes_equal_one(alone, child_env, tmp_path):
    """Metrics, evaluation and pictures as from one process; a tensor axis across processes shares every row.

    A data axis across processes: tests/test_preemption.py.
    """
    mesh = ("--config.mesh.data=1", "--config.mesh.tensor=2")
    together = tmp_path / "together"
    outputs = run_processes(child_env(), together, 2, *mesh)
    assert "smoke: step 20 of 20" in outputs[0]
    assert "smoke: step 20 of 20" not in outputs[1], "only the first process reports"
    ours, theirs = records(together), records(alone)
    assert [record["step"] for record in ours] == list(range(1, 21))
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose([a[name] for name in b], [b[name] for name in b], rtol=1e-4, err_msg=str(a["step"]))
    assert (together / "pictures" / "step_00000020.png").stat().st_size > 10_000
    manifest = json.loads((together / "seals" / "20.json").read_text())
    assert manifest == digests.file_digests(epath.Path(together / "checkpoints" / "20"))
    # Process 0 does not digest what the other wrote: that came from there.
    assert any(name.startswith("state/ocdbt.process_1/d/") for name in manifest)


@pytest.mark.long
def test_processes_of_two_devices_split_the_state(alone, child_env, tmp_path):
    """Their exchanges end, while devices are as many as cores, and one process finds the digests that two have made."""
    together = tmp_path / "together"
    devices = ("--config.cpu.devices=2", "--config.optim.shard_state=True")
    run_processes(child_env(devices=2), together, 2, *devices, "--config.checkpoint.every_steps=2")
    for a, b in zip(records(together), records(alone), strict=True):
        np.testing.assert_allclose([a[name] for name in b], [b[name] for name in b], rtol=1e-4, err_msg=str(a["step"]))
    run_of_one = mae_dist.open_run(together)
    assert run_of_one.evaluate("test")["test_loss"] == pytest.approx(records(together)[-1]["test_loss"], rel=1e-4)


def test_incomplete_flags_are_refused(child_env, tmp_path):
    """Two of three would hang; it is said at once."""
    code, output = run(child_env(), *ARGS, "--num_processes=2", "--process_id=0", f"--workdir={tmp_path / 'run'}")
    assert code == 2
    assert "--coordinator_address=None" in output
