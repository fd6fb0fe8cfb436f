"""The package as a library: trained and opened from Python, its commands by name."""

import concurrent.futures
import gc
import json
import logging
import math
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import logging as absl_logging
from ml_collections import ConfigDict

import mae_dist
from mae_dist import __main__ as commands
from mae_dist.data.from_config import open_data

ROOT = Path(__file__).resolve().parent.parent
WATCHED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def quick(total_steps: int) -> ConfigDict:
    """A few steps of smoke, not locked."""
    config = mae_dist.get_config("smoke").unlock()
    config.total_steps = total_steps
    config.log_every_steps = 1
    config.eval.every_steps = config.checkpoint.every_steps = 2
    config.eval.test_at_end = False
    config.pictures.every_steps, config.pictures.every_epochs = 0, 0.0
    config.model.depth = 1
    return config


def state_of_process() -> tuple[object, ...]:
    """What a library must leave as it is."""
    loggers = (logging.getLogger(), logging.getLogger("absl"))
    return (
        [signal.getsignal(number) for number in (*WATCHED, signal.SIGINT)],
        gc.isenabled(),
        [(logger.level, logger.handlers[:], logger.filters[:]) for logger in loggers],
        absl_logging.get_verbosity(),
        warnings.filters[:],
        {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", "jax_enable_preemption_service")},
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, mae_dist.Result]:
    """A finished run of four steps, and its result."""
    workdir = tmp_path_factory.mktemp("api") / "run"
    config, seen, ended = quick(4), set(), threading.Event()

    def look() -> None:
        while not ended.wait(0.01):
            seen.add(tuple(signal.getsignal(number) for number in WATCHED))

    records: list[dict[str, float]] = []
    before, threads, given = state_of_process(), set(threading.enumerate()), config.to_json()
    observer = threading.Thread(target=look)
    observer.start()
    try:
        result = mae_dist.train(config, workdir, on_record=records.append)
    finally:
        ended.set()
        observer.join()
    assert len(seen) == 1  # no handler was there for a while
    assert state_of_process() == before
    assert not [thread for thread in set(threading.enumerate()) - threads if not thread.daemon]
    assert records == mae_dist.open_run(workdir).metrics()
    assert config.to_json() == given
    assert not config.is_locked
    return workdir, result


def losses(workdir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_result(trained):
    """Its metrics are those recorded last; the same call again does nothing."""
    workdir, result = trained
    assert (result.step, result.status) == (4, "done")
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["val_loss"] == result.metrics["val_loss"]
    assert last["loss"] == result.metrics["loss"]
    assert all(isinstance(value, int | float) for value in result.metrics.values())
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.name in ("metrics.jsonl", "state")}
    assert mae_dist.train(quick(4), str(workdir)) == result
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.long
def test_own_loop_has_the_losses_of_train(trained):
    """To the last bit; and the batches of later steps are had without those before them."""
    job = mae_dist.build(quick(4))
    state, found = job.init_state(), []
    for batch in job.batches():
        state, metrics = job.train_step(state, batch)
        found.append(float(metrics["loss"]))
    assert found == losses(trained[0])
    with_last, (alone,) = batch, job.batches(start=3)
    assert all(np.array_equal(alone[name], with_last[name]) for name in alone)


def test_open_run(trained):
    workdir, result = trained
    run = mae_dist.open_run(workdir)
    assert (run.steps, run.step, run.config.name) == ([2, 4], 4, "smoke")
    assert [record["loss"] for record in run.metrics()] == losses(workdir)
    assert run.summary()["val_loss"] == result.metrics["val_loss"]
    assert run.evaluate() == {"val_loss": result.metrics["val_loss"]}

    early, late = (jax.tree.leaves(run.load_params(step)) for step in (2, None))
    assert [leaf.shape for leaf in early] == [leaf.shape for leaf in late]
    assert any((a != b).any() for a, b in zip(early, late, strict=True))
    with pytest.raises(mae_dist.errors.StorageFault, match="has no step 3; it has 2, 4"):
        run.load_params(3)

    dataset = open_data(run.config).val
    assert dataset is not None
    images = dataset.examples(np.arange(8))["image"]
    drawn = run.reconstruct(images)
    assert {name: (value.dtype, value.shape) for name, value in drawn.items()} == dict.fromkeys(
        ("original", "masked", "reconstruction", "with_visible"), (np.float32, images.shape)
    )
    np.testing.assert_allclose(drawn["original"], images / 255, atol=1e-6)
    visible = (drawn["masked"] == drawn["original"]).all(-1)  # (B, H, W); the mean of gray pixels may be visible too
    assert 0.2 < visible.mean() < 0.4
    assert (
        drawn["with_visible"] == np.where(visible[..., None], drawn["original"], drawn["reconstruction"])
    ).mean() > 0.99
    again = run.reconstruct(images.astype(np.float32) / 255)
    np.testing.assert_allclose(again["reconstruction"], drawn["reconstruction"], atol=1e-5)
    with pytest.raises(mae_dist.errors.DataFault, match="images have shape"):
        run.reconstruct(images[:, :8])
    assert run.encoder().features(images).shape == (8, 32)
    with pytest.raises(mae_dist.errors.StorageFault, match="is not the workdir of a run"):
        mae_dist.open_run(workdir.parent)


@pytest.mark.long
def test_continues_in_another_thread(trained):
    """With a longer schedule: the steps done stay done."""
    workdir = trained[0]
    before = losses(workdir)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        result = pool.submit(mae_dist.train, quick(6), workdir).result()
    assert result.step == 6
    assert losses(workdir)[:4] == before
    assert len(losses(workdir)) == 6
    assert math.isfinite(result.metrics["loss"])
    with pytest.raises(mae_dist.errors.StorageFault, match="is trained to step 6 already"):
        mae_dist.train(quick(4), workdir)


def test_faults(tmp_path):
    """Raised, with the field and the nearest name, before anything is written."""
    config = quick(2)
    config.optim.base_rl = 0.1
    with pytest.raises(mae_dist.errors.ConfigError, match=r"optim\.base_rl does not exist\. Did you mean 'base_lr'"):
        mae_dist.train(config, tmp_path / "run")
    config = quick(2)
    config.model.masking = "grit"
    with pytest.raises(
        mae_dist.errors.ConfigError, match=r"model\.masking='grit' is not one of .* Did you mean 'grid'"
    ):
        mae_dist.build(config)
    with pytest.raises(mae_dist.errors.ConfigError, match="of type dict"):
        mae_dist.train({}, tmp_path / "run")  # pyright: ignore[reportArgumentType]
    assert not list(tmp_path.iterdir())


def test_every_command_has_a_name():
    """And each name a module: a command that is not listed is not found."""
    runs_itself = 'if __name__ == "__main__":'
    found = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        for path in [*(ROOT / "mae_dist").glob("*.py"), *(ROOT / "mae_dist").glob("*/__main__.py")]
        if runs_itself in path.read_text() and path != ROOT / "mae_dist" / "__main__.py"
    }
    assert {module for module, _ in commands.COMMANDS.values()} == found


@pytest.mark.long
def test_commands_by_name(child_env):
    """As by their modules, help and faults alike."""

    def run(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", *arguments]
        done = subprocess.run(command, env=child_env(), cwd=ROOT, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    assert run("mae_dist", "trian")[0] == mae_dist.errors.EXIT_CONFIG
    assert "no command 'trian'. Did you mean 'train'?" in run("mae_dist", "trian")[1]
    assert run("mae_dist", "train", "--help") == run("mae_dist.main", "--help")
    assert run("mae_dist", "train", "--wrkdir=x") == run("mae_dist.main", "--wrkdir=x")
