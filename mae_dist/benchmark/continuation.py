"""Rows of the accelerator's table: trainings that are killed and continued, there and on the CPU."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from etils import epath

import mae_dist
from mae_dist.benchmark.options import NotHere, Options
from mae_dist.benchmark.turns import Result
from mae_dist.checkpoint import reader
from mae_dist.metrics.recorder import read_metrics

_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
_NOTHING_ELSE = (  # is computed than steps
    "--config.eval.every_epochs=0",
    "--config.eval.every_steps=0",
    "--config.eval.test_at_end=False",
    "--config.online.every_epochs=0",
    "--config.pictures.every_epochs=0",
    "--config.pictures.every_steps=0",
)
_LOSS_LIMIT = 1e-2  # between two trainings that differ in the order of their sums, in bfloat16
# Heads that cuDNN's kernel takes; the lengths are odd.
_BFLOAT16 = ("--config.model.dtype=bfloat16", "--config.model.embed_dim=64", "--config.model.num_heads=2")


def resume(options: Options, *, deterministic: bool) -> Iterator[Result]:
    """Kills a training within its steps, continues it, and compares losses and weights with an undisturbed one's.

    On a GPU sums may be taken in another order each time. With `deterministic`, as on other platforms, all must be
    equal bit by bit.
    """
    env = dict(os.environ)
    if deterministic:
        if options.platform != "gpu":
            raise NotHere("the option is of GPUs; elsewhere the row `resume` asks for equal bits")
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {_DETERMINISTIC}".strip()
    steps, every, kill_after = (60, 7, 20) if options.tiny else (400, 50, 120)
    args = (
        *(*_NOTHING_ELSE, *_BFLOAT16, "--config.log_every_steps=1", "--config.checkpoint.every_minutes=0"),
        *(f"--config.total_steps={steps}", f"--config.checkpoint.every_steps={every}"),
    )
    whole, killed = (epath.Path(options.scratch) / options.name / name for name in ("whole", "killed"))
    _run(env, whole, *args)
    process = _start(env, killed, *args)
    while process.poll() is None and _last_step(killed) < kill_after:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    reached = _last_step(killed)
    yield {"killed_at_step": reached, "of_steps": steps}
    faults = [] if reached < steps and process.returncode < 0 else [f"it was not killed: it ended at step {reached}"]
    output = _run(env, killed, *args)
    if "Continuing from step" not in output:
        faults.append("it began anew")
    figures, found = _differences(killed, whole)
    exact = deterministic or options.platform != "gpu"
    if exact and not figures["bit_equal"]:
        faults.append(f"it is not bit-equal: losses differ by {figures['loss_difference']:.2g}")
    if not figures["loss_difference"] <= _LOSS_LIMIT:
        faults.append(f"losses differ by {figures['loss_difference']:.2g}, more than {_LOSS_LIMIT:g}")
    yield {**figures, "faults": faults + found}


def _differences(workdir: epath.Path, other: epath.Path) -> tuple[Result, list[str]]:
    """Compares two finished runs: (figures, faults)."""
    mine, theirs = read_metrics(workdir), read_metrics(other)
    steps = [record["step"] for record in mine]
    if steps != [record["step"] for record in theirs]:
        return {"bit_equal": False, "loss_difference": math.inf}, [f"the records are of other steps: {steps[-3:]}"]
    losses = [(a["loss"], b["loss"]) for a, b in zip(mine, theirs, strict=True) if "loss" in a]
    last = int(steps[-1])
    digests = [reader.read_meta(place / "checkpoints" / str(last))["digests"] for place in (workdir, other)]
    mine, theirs = (jax.tree.leaves(mae_dist.open_run(place).load_params(last)) for place in (workdir, other))
    return {
        "bit_equal": digests[0] == digests[1] and all(a == b for a, b in losses),
        "loss_difference": max(abs(a - b) / abs(b) for a, b in losses),
        "weight_difference": max(float(np.max(np.abs(a - b))) for a, b in zip(mine, theirs, strict=True)),
    }, []


def to_cpu(options: Options) -> Iterator[Result]:
    """Trains on the accelerator, evaluates its checkpoint on the CPU, and continues an earlier one there."""
    args = (
        *(*_NOTHING_ELSE, "--config.eval.every_steps=20", "--config.log_every_steps=1"),
        *("--config.total_steps=40", "--config.checkpoint.every_steps=20", "--config.checkpoint.keep_latest=2"),
    )
    exact = {**os.environ, "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    on_cpu = {**exact, "JAX_PLATFORMS": "cpu"}
    there, here = (epath.Path(options.scratch) / options.name / name for name in ("there", "here"))
    _run(exact, there, *args)
    shutil.copytree(there, here)
    for path in (here / "checkpoints" / "40", here / "seals" / "40.json", here / "summary.json"):
        path.rmtree() if path.is_dir() else path.unlink()
    output = _run(on_cpu, here, *args)
    faults = [] if "Continuing from step 20" in output else ["it did not continue from step 20"]
    mine, theirs = ({record["step"]: record for record in read_metrics(place)} for place in (here, there))
    program = "import json, sys, mae_dist; print(json.dumps(mae_dist.open_run(sys.argv[1]).evaluate('val')))"
    done = subprocess.run(
        [sys.executable, "-c", program, str(there)], env=on_cpu, stdout=subprocess.PIPE, text=True, check=True
    )
    evaluated = json.loads(done.stdout.strip().splitlines()[-1])["val_loss"]
    pairs = {
        "evaluated_difference": (evaluated, theirs[40]["val_loss"]),
        "continued_loss_difference": (mine[40]["loss"], theirs[40]["loss"]),
        "continued_val_loss_difference": (mine[40]["val_loss"], theirs[40]["val_loss"]),
    }
    figures = {name: abs(a - b) / abs(b) for name, (a, b) in pairs.items()}
    for name, limit in zip(pairs, (1e-5, 1e-3, 1e-3), strict=True):
        if not figures[name] <= limit:
            faults.append(f"{name} {figures[name]:.2g} is not below {limit:g}")
    yield {"val_loss": theirs[40]["val_loss"], **figures, "faults": faults}


def _start(env: Mapping[str, str], workdir: epath.Path, *args: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mae_dist.main", "--config=smoke", f"--workdir={workdir}", *args]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _run(env: Mapping[str, str], workdir: epath.Path, *args: str) -> str:
    """Returns the output of a training, which must end well; it goes to the log too."""
    process = _start(env, workdir, *args)
    output, _ = process.communicate()
    print(output, flush=True)
    if process.returncode:
        last = (output.strip().splitlines() or ["it printed nothing"])[-1]
        raise RuntimeError(f"the training ended with code {process.returncode}: {last}")
    return output


def _last_step(workdir: epath.Path) -> int:
    """Returns the last step in the run's records, 0 before the first."""
    return int(max((record["step"] for record in read_metrics(workdir)), default=0))
