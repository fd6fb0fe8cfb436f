"""Helpers of the tests that start whole runs: as a process, or inside this one."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import smoke
from mae_dist import config as config_lib
from mae_dist.data import local_rows, to_global
from mae_dist.data.from_config import open_data
from mae_dist.training import job
from tests import QUICK

ROOT = Path(__file__).resolve().parent.parent
ONLY_UPDATES = (  # nothing is evaluated or drawn, which a run compiles for seconds
    "--config.eval.every_epochs=0",
    "--config.eval.every_steps=0",
    "--config.eval.test_at_end=False",
    "--config.online.every_epochs=0",
    "--config.pictures.every_epochs=0",
    "--config.pictures.every_steps=0",
)
# Figures of time: the only ones that may differ between a run and its repetition.
TIMING = ("images_per_sec", "step_secs", "data_wait", "eta_secs")


_started: list[subprocess.Popen[str]] = []


def end_all() -> None:
    """Kills what a test has started and, because it failed, not ended: it would take the cores from all that follow."""
    while _started:
        process = _started.pop()
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def start(env: dict[str, str], *args: str, module: str = "main", file_limit_kib: int = 0) -> subprocess.Popen[str]:
    """Starts `python -m mae_dist.<module>` in the clone, output captured; with a limit to a file's size if given."""
    command = [sys.executable, "-m", f"mae_dist.{module}", *args]
    if file_limit_kib:  # writing beyond it fails, as on a full disk; by default it would kill instead
        command = ["bash", "-c", f"trap '' XFSZ; ulimit -S -f {file_limit_kib}; exec \"$@\"", "bash", *command]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    _started.append(process)
    return process


def run(env: dict[str, str], *args: str, module: str = "main") -> tuple[int, str]:
    """Runs a command to its end: (exit code, output)."""
    process = start(env, *args, module=module)
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def kill_at_step(process: subprocess.Popen[str], workdir: Path, step: int) -> None:
    """Sends SIGKILL as soon as metrics.jsonl shows `step`."""
    wait_for_step([process], workdir, step)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=20)  # ends when the output is closed: worker processes must not live on
    assert process.returncode == -signal.SIGKILL


def records(workdir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the figures of time; a torn last line is left out."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [{name: value for name, value in json.loads(line).items() if name not in TIMING} for line in lines]


def last_step(workdir: Path) -> int:
    """The last step in metrics.jsonl, 0 before the first."""
    found = records(workdir)
    return found[-1]["step"] if found else 0


def smoke_config(**overrides: Any) -> ConfigDict:
    """configs/smoke.py with fields set by dotted name."""
    config = smoke.get_config()
    for field, value in overrides.items():
        section, _, key = field.rpartition("__")
        (config_lib.get(config, section.replace("__", ".")) if section else config)[key] = value
    config_lib.validate(config)
    return config


def losses(config: ConfigDict, num_devices: int) -> tuple[np.ndarray, Any]:
    """Really optimises for `config.total_steps` on the first devices: (loss of every update, final state)."""
    built = job.build(config, jax.devices()[:num_devices], open_data(config))
    rows = local_rows(built.batch_sharding, config.global_batch_size)
    values = []
    with jax.set_mesh(built.mesh), built.train_batches(built.data.train, 0, rows) as batches:
        state = jax.jit(built.init, out_shardings=built.shardings)(np.uint32(config.seed))
        for batch in batches:
            state, metrics = built.train_step(
                state, to_global(batch, built.batch_sharding, config.global_batch_size, rows)
            )
            values.append(float(metrics["loss"]))
    return np.array(values), state


def compile_quickly(built: job.Job, batch: dict[str, jax.Array]) -> tuple[Callable[[], Any], Any]:
    """(function to a new state, compiled update) of a job, for a few updates of batches like this one."""
    init = jax.jit(built.init, out_shardings=built.shardings, compiler_options=QUICK)
    with jax.set_mesh(built.mesh):
        lowered = built.train_step.lower(built.abstract_state, batch)
    seed = np.uint32(built.config.seed)
    return lambda: init(seed), built.train_step.compiled(lowered, compiler_options=QUICK)


def first_batch(built: job.Job) -> dict[str, jax.Array]:
    """The first global batch of a job."""
    rows = local_rows(built.batch_sharding, built.config.global_batch_size)
    with built.train_batches(built.data.train, 0, rows) as batches:
        return to_global(next(iter(batches)), built.batch_sharding, built.config.global_batch_size, rows)


def checkpoint_arrays(workdir: Path) -> Sequence[np.ndarray]:
    """Every array of the newest checkpoint, read by Orbax alone."""
    import orbax.checkpoint as ocp

    step = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    path = workdir / "checkpoints" / str(step) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restored = checkpointer.restore(path, restore_args=as_numpy)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(restored)]


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start_processes(env: dict[str, str], count: int, *args: str) -> list[subprocess.Popen[str]]:
    """Starts the processes of one run, joined on this machine; one alone is not joined with anything."""
    if count == 1:
        return [start(env, *args)]
    where = (f"--coordinator_address=127.0.0.1:{free_port()}", f"--num_processes={count}")
    return [start(env, *args, *where, f"--process_id={index}") for index in range(count)]


def end_of(processes: Sequence[subprocess.Popen[str]], timeout: float = 240) -> list[tuple[int, str]]:
    """(exit code, output) of each; whatever still runs after `timeout` seconds, or at a fault here, is killed."""
    deadline = time.monotonic() + timeout
    try:
        outputs = [process.communicate(timeout=max(0.1, deadline - time.monotonic()))[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def wait_for_step(processes: Sequence[subprocess.Popen[str]], workdir: Path, step: int) -> None:
    """Returns as soon as metrics.jsonl shows `step`; all processes must be alive till then."""
    deadline = time.monotonic() + 120
    while last_step(workdir) < step:
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run does not advance"
        time.sleep(0.01)


def wait_within_save(processes: Sequence[subprocess.Popen[str]], workdir: Path, num_bytes: int) -> bool:
    """Returns as soon as a save under way has written so much; False if a process ended first."""
    deadline = time.monotonic() + 60
    while all(process.poll() is None for process in processes) and time.monotonic() < deadline:
        for partial in (workdir / "checkpoints").glob("*tmp*"):
            written = 0
            for directory, _, names in os.walk(partial):  # files are renamed and vanish meanwhile
                for name in names:
                    with contextlib.suppress(OSError):
                        written += os.path.getsize(os.path.join(directory, name))
            if written >= num_bytes:
                return True
    return False
