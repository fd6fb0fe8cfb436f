"""Runs the trainings of a sweep, as many at once as there are shares of the cores."""

import contextlib
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from etils import epath

from mae_dist import config as config_lib
from mae_dist import errors
from mae_dist.metrics import results
from mae_dist.sweep import workers
from mae_dist.sweep.points import Point, Stage

_AGAIN = (errors.EXIT_PREEMPTED, errors.EXIT_STALLED, errors.EXIT_PEER_LOST)  # the same command continues
_RETRIES = 3  # of one training
_LOG = "log.txt"
# What a finished training may have been carried out with otherwise: no result depends on it.
_OF_THE_RESULT = ("total_steps", "total_epochs", "eval", "online")
HARMLESS = tuple(field for field in config_lib.FREE if field not in _OF_THE_RESULT)


def command(stage: Stage) -> list[str]:
    return [sys.executable, "-m", "mae_dist.main", *stage.arguments, f"--workdir={stage.workdir}"]


def trainings(todo: Sequence[Point]) -> dict[str, list[Stage]]:
    """By the name of a point what is trained there; what several share only at the first of them."""
    taken: set[Path] = set()
    found = {}
    for point in todo:
        found[point.name] = [stage for stage in point.stages if stage.workdir not in taken]
        taken.update(stage.workdir for stage in point.stages)
    return found


def is_finished(stage: Stage) -> bool:
    """Whether the training has come to its end, with all that its result depends on as it is now."""
    found = results.read_result(epath.Path(stage.workdir))
    return found is not None and not config_lib.differences(found.config, stage.config, ignore=HARMLESS)


class _Work:
    """What is left to do at a point, and the training under way there."""

    def __init__(self, name: str, stages: Sequence[Stage]):
        self.name = name
        self.left = deque(stages)
        self.cores: Sequence[int] = ()
        self.retries = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.began = 0.0

    def give_up(self, stage: Stage) -> None:
        """With it goes what begins from it."""
        self.left = deque(other for other in self.left if other is not stage and not _follows(other, stage))

    def start(self) -> None:
        stage = self.left[0]
        stage.workdir.mkdir(parents=True, exist_ok=True)
        self.began = time.monotonic()
        self.process = workers.start(command(stage), stage.workdir / _LOG, self.cores)


def _follows(stage: Stage, other: Stage) -> bool:
    return stage.config.init_from == str(other.workdir)


class Runner:
    """Runs points, as many at once as there are shares of the cores.

    Attributes:
      failures: name of a training's workdir -> what became of it. It takes along what begins from it, and nothing else.
    """

    def __init__(self, todo: Sequence[Point], cores: Sequence[Sequence[int]]):
        self._count = len(todo)
        self._free = list(cores)
        self._jobs = len(cores)
        self._running: list[_Work] = []
        self._signals: list[int] = []
        self._stopped_by = 0
        self._secs: dict[str, list[float]] = {}  # of the trainings that ended here, by the name of their stage
        self._ended = 0
        self.failures: dict[str, str] = {}
        self._waiting = deque(_Work(name, stages) for name, stages in trainings(todo).items())
        for work in self._waiting:
            for stage in list(work.left):
                if stage in work.left:  # what it begins from may have been given up meanwhile
                    self._look(work, stage)

    def _look(self, work: _Work, stage: Stage) -> None:
        """Takes a training from what is left if it is finished, or cannot be done."""
        try:
            follow = [str(other.workdir) for other in work.left if _follows(other, stage)]
            if is_finished(stage):
                work.left.remove(stage)
            elif stale := [workdir for workdir in follow if Path(workdir, "config.json").exists()]:
                raise errors.ConfigError(
                    f"{stage.workdir} is not finished, and what follows it began from something else; delete "
                    f"{' and '.join(stale)} first"
                )
        except (OSError, errors.UserError) as error:
            self._give_up(work, stage, str(error))

    def run(self) -> int:
        """Until all is done or a signal ends it; returns the exit code."""
        with self._taking_signals():
            while self._running or (self._waiting and not self._stopped_by):
                self._pass_signals_on()
                while self._free and self._waiting and not self._stopped_by:
                    self._begin(self._waiting.popleft())
                for work in list(self._running):
                    assert work.process is not None
                    if work.process.poll() is not None:
                        self._after(work, work.process.returncode)
                time.sleep(0.05)
        unfinished = self._count - self._ended
        if unfinished:
            self._tell(f"stopped with {unfinished} points to go; the same command continues")
            return errors.EXIT_INTERRUPTED if self._stopped_by == signal.SIGINT else errors.EXIT_PREEMPTED
        return errors.EXIT_INTERNAL if self.failures else errors.EXIT_DONE

    @contextlib.contextmanager
    def _taking_signals(self) -> Iterator[None]:
        """Notes SIGTERM, SIGHUP (unless ignored, as by `nohup`) and Ctrl-C; another end takes the trainings along."""
        taken = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            taken.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._note) for number in taken}
        try:
            yield
        finally:
            for work in self._running:
                if work.process is not None:
                    work.process.kill()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        del frame
        self._signals.append(number)

    def _pass_signals_on(self) -> None:
        while self._signals:
            self._stopped_by = self._signals.pop(0)
            self._tell(f"{signal.Signals(self._stopped_by).name}: passed on to {len(self._running)} trainings")
            for work in self._running:
                assert work.process is not None
                work.process.send_signal(self._stopped_by)

    def _begin(self, work: _Work) -> None:
        work.cores = self._free.pop(0)
        self._running.append(work)
        self._go_on(work)

    def _go_on(self, work: _Work) -> None:
        """Starts what is left at a point; after the last, or a signal, gives its share of the cores back."""
        while work.left and not self._stopped_by:
            stage = work.left[0]
            self._tell(f"{work.name}: {stage.name} began")
            try:
                work.start()
                return
            except OSError as error:
                self._give_up(work, stage, f"{stage.name} cannot be started: {error}")
        self._release(work)
        if not work.left:
            self._ended += 1
            self._tell(f"{work.name}: nothing left to do")

    def _after(self, work: _Work, code: int) -> None:
        """What follows the end of a training."""
        stage, name = work.left[0], work.name
        if code == errors.EXIT_DONE:
            secs = time.monotonic() - work.began
            self._secs.setdefault(stage.name, []).append(secs)
            work.left.popleft()
            self._tell(f"{name}: {stage.name} took {_duration(secs)}: {self._figures(stage)}{self._eta()}")
        elif self._stopped_by:
            self._tell(f"{name}: {stage.name} ended with code {code}")
        elif code in _AGAIN and work.retries < _RETRIES:
            work.retries += 1
            self._tell(f"{name}: {stage.name} ended with code {code}; once more ({work.retries} of {_RETRIES})")
            self._go_on(work)
            return
        else:
            log = stage.workdir / _LOG
            self._give_up(work, stage, f"{stage.name}, code {code}; the end of {log}:\n    {_end_of(log)}")
        work.retries = 0
        self._go_on(work)

    def _give_up(self, work: _Work, stage: Stage, reason: str) -> None:
        self.failures[stage.workdir.name] = reason
        work.give_up(stage)
        self._tell(f"{stage.workdir.name} FAILED: {reason.splitlines()[0]}")

    def _release(self, work: _Work) -> None:
        self._running.remove(work)
        self._free.append(work.cores)

    def _tell(self, event: str) -> None:
        with contextlib.suppress(OSError):  # nobody reads it any more: no reason to end the trainings
            print(f"{time.strftime('%H:%M:%S')} {self._ended}/{self._count} {event}", flush=True)

    @staticmethod
    def _figures(stage: Stage) -> str:
        try:
            found = results.read_result(epath.Path(stage.workdir))
        except errors.StorageFault as fault:
            return str(fault)
        return ", ".join(f"{name} {value:.4f}" for name, value in (found.metrics if found else {}).items())

    def _eta(self) -> str:
        """By the mean time of each kind of training; of a kind that none ended of yet, by that of all."""
        all_secs = [secs for kind in self._secs.values() for secs in kind]
        ahead = [stage for work in (*self._waiting, *self._running) for stage in work.left]
        secs = sum(statistics.fmean(self._secs.get(stage.name, all_secs)) for stage in ahead)
        return f"; about {_duration(secs / self._jobs)} to go" if ahead else ""


def _end_of(log: Path) -> str:
    try:
        return "\n    ".join(workers.last_lines(log, 5))
    except OSError as error:
        return f"it cannot be read: {error}"


def _duration(secs: float) -> str:
    minutes, secs = divmod(round(secs), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {secs} s" if minutes else f"{secs} s"
