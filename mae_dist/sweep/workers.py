"""Child processes of a command: each on its share of the cores, none of which outlives the command."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mae_dist.cpu.cores import num_cores
from mae_dist.errors import ConfigError

_PR_SET_PDEATHSIG = 1  # of Linux' prctl: the signal to get when the parent dies, even by kill -9


def share_cores(count: int) -> list[list[int]]:
    """The cores this process may use in `count` parts of about equal size; [] where the system does not say which."""
    available = num_cores()
    if not 1 <= count <= available:
        raise ConfigError(f"--jobs={count}: each needs a core, and this process may use {available}; choose 1 or more")
    if not hasattr(os, "sched_getaffinity"):
        return [[] for _ in range(count)]
    cores = sorted(os.sched_getaffinity(0))
    return [cores[len(cores) * i // count : len(cores) * (i + 1) // count] for i in range(count)]


def start(command: Sequence[str], log: Path, cores: Sequence[int]) -> subprocess.Popen[bytes]:
    """Starts a process whose output is appended to `log`, on `cores` (all, if empty).

    It is in a session of its own, so that Ctrl-C reaches it only by way of its parent. On Linux it is killed when the
    parent dies; its data is safe then, as after any kill.
    """
    # Not by preexec_fn, which forks a process that may have threads: this module goes first, then becomes the command.
    before = [sys.executable, "-m", "mae_dist.sweep.workers", str(os.getpid()), ",".join(map(str, cores))]
    with log.open("ab") as output:
        return subprocess.Popen(
            [*before, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _become(parent: str, cores: str, *command: str) -> None:
    """In the new process: limits it to `cores`, ties it to `parent` and runs `command` in its place."""
    if cores:
        os.sched_setaffinity(0, map(int, cores.split(",")))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):  # it died before that
            sys.exit(1)
    os.execvp(command[0], command)


def last_lines(log: Path, count: int) -> list[str]:
    """The end of a log, without empty lines."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 20_000))
        text = file.read().decode("utf-8", "replace")
    return [line.rstrip() for line in text.splitlines() if line.strip()][-count:]


if __name__ == "__main__":
    _become(*sys.argv[1:])
