"""The long trial of `tests/soak.sh`: a run of two processes under preemptions, kills and corrupted checkpoints."""

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from mae_dist.errors import EXIT_DONE, EXIT_PEER_LOST, EXIT_PREEMPTED
from tests.runs import checkpoint_arrays, end_of, last_step, records, start_processes, wait_within_save

ARGS = (
    "--config=configs/smoke.py",
    "--config.log_every_steps=1",
    "--config.checkpoint.every_steps=3",
    "--config.checkpoint.keep_latest=4",
    "--config.eval.every_steps=20",
    "--config.pictures.every_epochs=0",
    "--config.pictures.every_steps=0",
    "--config.data.augment=crop_flip",
    "--config.model.drop_path=0.1",
    "--config.trace=True",
    "--config.deadlines.peer_secs=6",
)
STEPS_PER_ROUND = 12
HANG_SECS = 120
CORRUPTIONS = ("flip", "truncate", "missing", "empty", "no meta", "foreign")


def saved_steps(workdir: Path) -> list[int]:
    """Complete checkpoints, ascending."""
    return sorted(int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit())


def corrupt(draw: random.Random, checkpoint: Path) -> str:
    """Does to a checkpoint what a fault does; which."""
    kind = draw.choice(CORRUPTIONS)
    victim = draw.choice([path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size])
    if kind == "flip":
        content = bytearray(victim.read_bytes())
        content[draw.randrange(len(content))] ^= draw.randrange(1, 256)
        victim.write_bytes(content)
    elif kind == "truncate":
        os.truncate(victim, draw.randrange(victim.stat().st_size))
    elif kind == "missing":
        victim.unlink()
    elif kind == "no meta":
        shutil.rmtree(checkpoint / "meta")
    else:
        shutil.rmtree(checkpoint)
        checkpoint.mkdir()
        if kind == "foreign":
            (checkpoint / "cat.jpg").write_bytes(b"no checkpoint")
    return kind


class Trial:
    """One workdir through all rounds, and what went wrong."""

    def __init__(self, workdir: Path, env: dict[str, str], total_steps: int, draw: random.Random):
        self.workdir, self.env, self.draw = workdir, env, draw
        self.args = (*ARGS, f"--config.total_steps={total_steps}", f"--workdir={workdir}")
        self.good: list[int] = []  # the steps a start may continue from, ascending
        self.count: Counter[str] = Counter()

    def fault(self, kind: str, text: str) -> None:
        """Counts and shows something that must not happen."""
        self.count[kind] += 1
        print(f"FAULT ({kind}): {text}", flush=True)

    def round(self, kind: str) -> None:
        """Starts both processes, lets them get on a while, and does what `kind` says."""
        expected = self.good[-1] if self.good else 0
        metrics = self.workdir / "metrics.jsonl"
        written = metrics.stat().st_mtime_ns if metrics.exists() else 0
        processes = start_processes(self.env, 2, *self.args)
        target = expected + self.draw.randint(1, STEPS_PER_ROUND)
        deadline = time.monotonic() + HANG_SECS
        # What was recorded beyond the checkpoint is still there until the new processes begin.
        while not (
            metrics.exists() and metrics.stat().st_mtime_ns > written and last_step(self.workdir) >= target
        ) and all(process.poll() is None for process in processes):
            if time.monotonic() > deadline:
                self.fault("hangs", f"no progress to step {target}")
                break
            time.sleep(0.002)
        if kind == "kill" and self.draw.random() < 0.5:  # of 0.5 MiB; in the middle of a save
            wait_within_save(processes, self.workdir, self.draw.randrange(400_000))
        else:
            time.sleep(self.draw.random() * 0.05)  # anywhere within an update, a save, an evaluation
        victim = self.draw.choice(processes)
        number = signal.SIGTERM if kind == "preemption" else signal.SIGKILL
        with contextlib.suppress(ProcessLookupError):
            victim.send_signal(number)
        if kind == "preemption" and self.draw.random() < 0.3:
            self.draw.choice(processes).send_signal(signal.SIGTERM)
        self.judge(kind, processes, victim, expected)

    def judge(self, kind: str, processes: list[subprocess.Popen[str]], victim: object, expected: int) -> None:
        """Ends the round: codes, where it had continued, and what is saved now."""
        try:
            ended = end_of(processes, HANG_SECS)
        except subprocess.TimeoutExpired:
            self.fault("hangs", f"after a {kind}")
            ended = [(-1, "")] * 2
        wanted = {EXIT_PREEMPTED} if kind == "preemption" else {EXIT_PEER_LOST, -signal.SIGKILL}
        for process, (code, output) in zip(processes, ended, strict=True):
            allowed = wanted if process is not victim or kind == "preemption" else {-signal.SIGKILL}
            if code not in allowed:
                self.fault("wrong codes", f"{code} after a {kind}\n{output[-3000:]}")
        continued = re.search(r"Continuing from step (\d+)", ended[0][1])
        if int(continued.group(1) if continued else 0) != expected:
            self.fault("wrong restores", f"continued from {continued and continued.group(0)}, saved was {expected}")
        self.good = saved_steps(self.workdir)
        if kind == "preemption" and self.good and self.good[-1] < last_step(self.workdir):
            self.fault("lost steps", f"step {last_step(self.workdir)} was done, {self.good[-1]} saved")
        self.count[kind] += 1
        print(f"{kind}: at step {last_step(self.workdir)}, saved {self.good[-3:]}", flush=True)

    def corrupt_newest(self) -> None:
        """Corrupts one or two of the newest checkpoints; the one before is what goes on."""
        for _ in range(self.draw.randint(1, 2)):
            if len(self.good) > 1:
                step = self.good.pop()
                kind = corrupt(self.draw, self.workdir / "checkpoints" / str(step))
                self.count["corruption"] += 1
                print(f"corruption: {kind} of step {step}, to go on from {self.good[-1]}", flush=True)


def run_to_the_end(env: dict[str, str], *args: str) -> None:
    """Both processes, undisturbed."""
    ended = end_of(start_processes(env, 2, *args), 1800)
    assert [code for code, _ in ended] == [EXIT_DONE] * 2, "\n".join(output[-3000:] for _, output in ended)


def main() -> int:
    """Runs the trial; 1 if anything was lost, wrong or stuck."""
    parser = argparse.ArgumentParser(prog="bash tests/soak.sh")
    parser.add_argument("--preemptions", type=int, default=20)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--corruptions", type=int, default=10, help="the least number of checkpoints")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--workdir", type=Path, default=None)
    given = parser.parse_args()
    base = given.workdir or Path(tempfile.mkdtemp(prefix="soak_"))
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    env |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(base / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    print(f"seed {given.seed}, {base}", flush=True)
    total_steps = (given.preemptions + given.kills) * STEPS_PER_ROUND
    trial = Trial(base / "run", env, total_steps, random.Random(given.seed))
    kinds = ["preemption"] * given.preemptions + ["kill"] * given.kills
    trial.draw.shuffle(kinds)
    for index, kind in enumerate(kinds):
        trial.round(kind)
        left = len(kinds) - index
        if trial.count["corruption"] < given.corruptions and trial.draw.random() < given.corruptions / left:
            trial.corrupt_newest()
    run_to_the_end(env, *trial.args)
    run_to_the_end(env, *(arg for arg in trial.args if "--workdir" not in arg), f"--workdir={base / 'undisturbed'}")
    if records(trial.workdir) != records(base / "undisturbed"):
        trial.fault("wrong restores", "the records differ from those of the undisturbed run")
    pairs = zip(checkpoint_arrays(trial.workdir), checkpoint_arrays(base / "undisturbed"), strict=True)
    equal = all(np.array_equal(a, b) for a, b in pairs)
    if not equal:
        trial.fault("wrong restores", "the final parameters differ from those of the undisturbed run")
    faults = {name: trial.count[name] for name in ("lost steps", "wrong restores", "hangs", "wrong codes")}
    print(
        f"{trial.count['preemption']} preemptions, {trial.count['kill']} kills, {trial.count['corruption']} corrupted "
        f"checkpoints over {total_steps} updates: {', '.join(f'{name} {count}' for name, count in faults.items())}; "
        f"final state {'equal to' if equal else 'DIFFERENT from'} the undisturbed run's"
    )
    if given.workdir is None and not any(faults.values()):
        shutil.rmtree(base)
    return int(any(faults.values()))


if __name__ == "__main__":
    sys.exit(main())
