"""Runs the trainings of a sweep: a pool of threads, each with a fraction of the cores and one training at a time."""

import contextlib
import datetime
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath

from mae_dist import config as config_lib
from mae_dist import errors
from mae_dist.cpu.cores import num_cores
from mae_dist.metrics import results
from mae_dist.sweep.points import Point, Stage

_AGAIN = (errors.EXIT_PREEMPTED, errors.EXIT_STALLED, errors.EXIT_PEER_LOST)  # the same command continues
_RETRIES = 3  # of one training
_LOG = "log.txt"
# A finished training may differ in the other free fields: no result depends on them.
_OF_THE_RESULT = {"total_steps", "total_epochs", "eval", "online", "optim.grad_exchange"}
# Becomes a command that Linux kills when the thread that started it dies, even by SIGKILL (PR_SET_PDEATHSIG is 1). Not
# a `preexec_fn`, which is not safe in a process with threads.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""


def command(stage: Stage) -> list[str]:
    """Returns the command of a training."""
    return [sys.executable, "-m", "mae_dist.main", *stage.arguments, f"--workdir={stage.workdir}"]


def trainings(todo: Sequence[Point]) -> dict[str, list[Stage]]:
    """Returns what is trained at each point, by its name; a training of several points is at the first of them."""
    taken: set[Path] = set()
    found = {}
    for point in todo:
        found[point.name] = [stage for stage in point.stages if stage.workdir not in taken]
        taken.update(stage.workdir for stage in point.stages)
    return found


def is_finished(stage: Stage) -> bool:
    """True if the training has ended, with the config that it has now in all that its result depends on."""
    found = results.read_result(epath.Path(stage.workdir))
    harmless = [field for field in config_lib.FREE if field not in _OF_THE_RESULT]
    return found is not None and not config_lib.differences(found.config, stage.config, ignore=harmless)


def split_cores(jobs: int) -> list[list[int]]:
    """Returns the cores of this process in `jobs` parts of about equal size; [] where the system does not list them."""
    available = num_cores()
    if not 1 <= jobs <= available:
        raise errors.ConfigError(
            f"--jobs={jobs}: each needs a core, and this process may use {available}; choose 1 or more"
        )
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return [cores[len(cores) * i // jobs : len(cores) * (i + 1) // jobs] for i in range(jobs)]


def _begins_from(stage: Stage, other: Stage) -> bool:
    return stage.config.init_from == str(other.workdir)


class Runner:
    """Runs the trainings of points, as many at once as there are parts of the cores.

    Attributes:
      failures: name of a training's workdir -> why it failed. What begins from it is left out, and nothing else.
    """

    def __init__(self, todo: Sequence[Point], cores: Sequence[Sequence[int]]):
        self._cores = list(cores)
        self._jobs = len(cores)
        self._left = trainings(todo)  # by point
        self._secs: dict[str, list[float]] = {}  # by kind of training: how long each took
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stopped_by = 0  # a signal
        self._lock = threading.RLock()
        self.failures: dict[str, str] = {}
        for name, stages in self._left.items():
            for stage in list(stages):
                if stage in stages:  # not left out with what it begins from
                    self._check(name, stage)

    def _check(self, name: str, stage: Stage) -> None:
        """Leaves out a training that is finished, or cannot be done."""
        try:
            if is_finished(stage):
                self._left[name].remove(stage)
                return
            followers = [other.workdir for other in self._left[name] if _begins_from(other, stage)]
            if stale := [str(workdir) for workdir in followers if (workdir / "config.json").exists()]:
                raise errors.ConfigError(
                    f"{stage.workdir} is not finished, and what follows it began from something else; delete "
                    f"{' and '.join(stale)} first"
                )
        except (OSError, errors.UserError) as error:
            self._fail(name, stage, str(error))

    def run(self) -> int:
        """Runs until all is done or a signal stops it; returns the exit code."""
        with self._handling_signals(), ThreadPoolExecutor(self._jobs, initializer=self._take_cores) as pool:
            try:
                list(pool.map(self._run_point, self._left))
            except BaseException:
                self._stop(signal.SIGKILL)
                raise
        if unfinished := len(self._left) - self._num_done():
            self._log(f"stopped with {unfinished} points to go; the same command continues")
            return errors.EXIT_INTERRUPTED if self._stopped_by == signal.SIGINT else errors.EXIT_PREEMPTED
        return errors.EXIT_INTERNAL if self.failures else errors.EXIT_DONE

    def _take_cores(self) -> None:
        """Limits this thread, and so the processes that it starts, to a part of the cores."""
        if cores := self._cores.pop():
            os.sched_setaffinity(0, cores)

    @contextlib.contextmanager
    def _handling_signals(self) -> Generator[None]:
        """Holds handlers of SIGTERM, Ctrl-C and SIGHUP, unless that is ignored, as by `nohup`."""
        with contextlib.ExitStack() as stack:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                    stack.callback(signal.signal, number, signal.signal(number, self._stop))
            yield

    def _stop(self, number: int, frame: object = None) -> None:
        """Passes a signal on to the trainings that run; no other one starts after it."""
        del frame
        with self._lock:
            self._stopped_by = number
            running = [process for process in self._processes if process.poll() is None]
            self._log(f"{signal.Signals(number).name}: passed on to {len(running)} trainings")
            for process in running:
                process.send_signal(number)

    def _run_point(self, name: str) -> None:
        """Runs what is left at a point, one training after another, until a signal stops it."""
        left = self._left[name]
        while left and not self._stopped_by:
            stage = left[0]
            self._log(f"{name}: {stage.name} began")
            began = time.monotonic()
            try:
                code = self._train(name, stage)
            except OSError as error:
                self._fail(name, stage, f"{stage.name} cannot be started: {error}")
                continue
            with self._lock:
                if code == errors.EXIT_DONE:
                    secs = time.monotonic() - began
                    self._secs.setdefault(stage.name, []).append(secs)
                    left.remove(stage)
                    self._log(f"{name}: {stage.name} took {_duration(secs)}: {_metrics(stage)}{self._eta()}")
                elif self._stopped_by:
                    self._log(f"{name}: {stage.name} ended with code {code}")
                else:
                    log = stage.workdir / _LOG
                    self._fail(name, stage, f"{stage.name}, code {code}; the end of {log}:\n    {_end_of(log)}")
        if not left:
            self._log(f"{name}: nothing left to do")

    def _train(self, name: str, stage: Stage) -> int | None:
        """Runs a training, again after a code that asks for it; returns the last code, None if it did not start."""
        stage.workdir.mkdir(parents=True, exist_ok=True)
        code = self._run_command(stage)
        for retry in range(1, _RETRIES + 1):
            if code not in _AGAIN or self._stopped_by:
                break
            self._log(f"{name}: {stage.name} ended with code {code}; once more ({retry} of {_RETRIES})")
            code = self._run_command(stage)
        return code

    def _run_command(self, stage: Stage) -> int | None:
        """Runs the command of a training with its output appended to log.txt; returns its exit code."""
        line = command(stage)
        if sys.platform == "linux":
            line = [sys.executable, "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *line]
        with self._lock, (stage.workdir / _LOG).open("ab") as output:
            if self._stopped_by:
                return None
            process = subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches it once, from here
            )
            self._processes.append(process)
        return process.wait()

    def _fail(self, name: str, stage: Stage, reason: str) -> None:
        """Leaves out a training that failed, and what begins from it."""
        with self._lock:
            self.failures[stage.workdir.name] = reason
            left = self._left[name]
            left[:] = [other for other in left if other is not stage and not _begins_from(other, stage)]
            self._log(f"{stage.workdir.name} FAILED: {reason.splitlines()[0]}")

    def _num_done(self) -> int:
        return sum(not stages for stages in self._left.values())

    def _log(self, event: str) -> None:
        with self._lock, contextlib.suppress(OSError):  # that nobody reads it is no reason to end the trainings
            print(f"{time.strftime('%H:%M:%S')} {self._num_done()}/{len(self._left)} {event}", flush=True)

    def _eta(self) -> str:
        """Estimates the time that is left from the mean of each kind of training, or of all where there is none yet."""
        all_secs = [secs for kind in self._secs.values() for secs in kind]
        ahead = [stage for stages in self._left.values() for stage in stages]
        secs = sum(statistics.fmean(self._secs.get(stage.name, all_secs)) for stage in ahead)
        return f"; about {_duration(secs / self._jobs)} to go" if ahead else ""


def _metrics(stage: Stage) -> str:
    try:
        found = results.read_result(epath.Path(stage.workdir))
    except errors.StorageFault as fault:
        return str(fault)
    return ", ".join(f"{name} {value:.4f}" for name, value in (found.metrics if found else {}).items())


def _end_of(log: Path) -> str:
    """Returns the last lines of a log that are not empty."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        return f"it cannot be read: {error}"
    return "\n    ".join([line.rstrip() for line in lines if line.strip()][-5:])


def _duration(secs: float) -> str:
    return str(datetime.timedelta(seconds=round(secs)))
