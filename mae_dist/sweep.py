"""Trains all combinations of fields' values: `python -m mae_dist.sweep --config F --over config.a.b=x,y --seeds 3`.

Each combination and seed is a run of `mae_dist.main` in a workdir of its own under --out, with `--then probe,finetune`
followed by those of configs/recipes.py; `scratch`, which no masking changes, is trained once for all. The same line
again skips what is finished and continues the rest; a failure takes along what begins from it and nothing else.
SIGTERM, SIGHUP and Ctrl-C are passed on to the runs, which save. `--out D --table` shows what there is so far.
--config.a.b=x is for all.
"""

import contextlib
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from mae_dist import cli, errors, points, sweep_table, workers
from mae_dist import config as config_lib
from mae_dist.config import named, recipes
from mae_dist.metrics import results
from mae_dist.points import Point, Stage
from mae_dist.resilience.lock import sole_user
from mae_dist.storage import check_checkpoints, local

_OVER = flags.DEFINE_multi_string("over", [], "config.section.field=value,value,…; repeat it for further fields.")
_SEEDS = flags.DEFINE_integer("seeds", 1, "How many seeds, from the config's own on.", lower_bound=1)
_THEN = flags.DEFINE_list("then", [], "What follows at each point: probe, finetune, scratch.")
_SET = flags.DEFINE_multi_string("set", [], "A field of what follows, as probe.total_epochs=5; repeat it for others.")
_JOBS = flags.DEFINE_integer("jobs", 1, "Runs at once, each on its share of the cores.")
_OUT = flags.DEFINE_string("out", None, "A local directory (default runs/sweep_<config.name>).", allow_override=True)
_TABLE = flags.DEFINE_bool("table", False, "Only write and print the table of what is finished in --out.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only print the points and their commands.")

_RECIPES = ("probe", "finetune", "scratch")
_AGAIN = (errors.EXIT_PREEMPTED, errors.EXIT_STALLED, errors.EXIT_PEER_LOST)  # the same command continues
_RETRIES = 3  # of one training
_LOG = "log.txt"
# What a finished training may have been carried out with otherwise: no result depends on it.
_OF_THE_RESULT = ("total_steps", "total_epochs", "eval", "online")
_HARMLESS = tuple(field for field in config_lib.FREE if field not in _OF_THE_RESULT)


def sweep(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    if len(argv) > 1:
        raise errors.ConfigError(f"unexpected arguments {argv[1:]}; fields to sweep over are --over=config.a.b=x,y")
    if _TABLE.value:
        return show_table(_local(cli.required(_OUT)))
    base = _base()
    out = _local(_OUT.value or f"runs/sweep_{base.name}")
    check_checkpoints(out, saving=True)
    todo = _points(base, out)
    workable = [point for point in todo if not point.fault]
    faults = {point.name: f"cannot work: {point.fault}" for point in todo if point.fault}
    print(f"{len(todo)} points in {out}, {len(faults)} of them cannot work", flush=True)
    for name, fault in faults.items():
        print(f"  {name} {fault}", flush=True)
    if not workable:
        raise errors.ConfigError("no point of the sweep can work")
    if _DRY_RUN.value:
        for stages in _trainings(workable).values():
            for stage in stages:
                print(shlex.join(_command(stage)))
        return errors.EXIT_DONE
    cores = workers.share_cores(_JOBS.value)
    with sole_user(out):
        sweep_table.describe(out, list(todo[0].fields), _THEN.value, [_described(point) for point in todo])
        runner = Runner(workable, cores)
        code = runner.run()
        show_table(out)
    for name, reason in (faults | runner.failures).items():
        print(f"FAILED {name}: {reason}", flush=True)
    return errors.EXIT_CONFIG if faults and code == errors.EXIT_DONE else code


def _described(point: Point) -> dict[str, Any]:
    follow = {stage.name: stage.workdir.name for stage in point.stages[1:]}
    return {"name": point.name, "fields": point.fields, "seed": point.seed, "fault": point.fault, "follow": follow}


def _local(value: str) -> epath.Path:
    return local(value, "--out", "a sweep is kept on a disk; write to a local path")


def _base() -> ConfigDict:
    """What --config names; it need not be able to work as it is."""
    base = cli.given_config()
    if base is None:
        raise errors.ConfigError("--config is missing: for example --config configs/quickstart.py")
    return base


def _points(base: ConfigDict, out: epath.Path) -> list[Point]:
    """What the flags ask for, each point checked."""
    flag, default = flags.FLAGS["config"], cli.default_config()
    if unknown := [name for name in _THEN.value if name not in _RECIPES]:
        raise errors.ConfigError(f"--then={unknown[0]} is not one of {', '.join(_RECIPES)}")
    if _THEN.value and base.task != "pretrain":
        raise errors.ConfigError(f"--then follows a pretraining, and task={base.task!r}")
    changes: dict[str, dict[str, str]] = {name: {} for name in _THEN.value}
    for text in _SET.value:
        field, _, value = text.partition("=")
        recipe, _, field = field.partition(".")
        if recipe not in changes or not field:
            raise errors.ConfigError(f"--set={text}: write <recipe>.<field>=value, with a recipe of --then")
        changes[recipe][field.removeprefix("config.")] = value
    file = str(named.path("default"))
    return points.make_points(
        points.parse_over(_OVER.value, base),
        range(base.seed, base.seed + _SEEDS.value),
        Path(out),
        points.first_stage(base, config_flags.get_config_filename(flag), config_flags.get_override_values(flag)),
        [points.next_stage(name, getattr(recipes, name), changes[name], default, file) for name in _THEN.value],
    )


def _command(stage: Stage) -> list[str]:
    return [sys.executable, "-m", "mae_dist.main", *stage.arguments, f"--workdir={stage.workdir}"]


def _trainings(todo: Sequence[Point]) -> dict[str, list[Stage]]:
    """By the name of a point what is trained there; what several share only at the first of them."""
    taken: set[Path] = set()
    found = {}
    for point in todo:
        found[point.name] = [stage for stage in point.stages if stage.workdir not in taken]
        taken.update(stage.workdir for stage in point.stages)
    return found


def _is_finished(stage: Stage) -> bool:
    """Whether the training has come to its end, with all that its result depends on as it is now."""
    found = results.read_result(epath.Path(stage.workdir), cli.default_config())
    return found is not None and not config_lib.differences(found.config, stage.config, ignore=_HARMLESS)


def show_table(out: epath.Path) -> int:
    """Writes and prints the table of a sweep, finished or not."""
    description = sweep_table.read_description(out)
    if description is None:
        raise errors.ConfigError(f"--out={out} is not the directory of a sweep: it has no sweep.json")
    default = cli.default_config()

    def read(name: str) -> results.Result | None:
        try:
            return results.read_result(out / name, default)
        except errors.StorageFault as fault:
            print(f"left out: {fault}", flush=True)
            return None

    table = sweep_table.Table(description, read)
    table.write(out)
    print(f"{table.text()}\n{out / 'table.csv'}, table.json, figures/", flush=True)
    return errors.EXIT_DONE


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
        self.process = workers.start(_command(stage), stage.workdir / _LOG, self.cores)


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
        self._waiting = deque(_Work(name, stages) for name, stages in _trainings(todo).items())
        for work in self._waiting:
            for stage in list(work.left):
                if stage in work.left:  # what it begins from may have been given up meanwhile
                    self._look(work, stage)

    def _look(self, work: _Work, stage: Stage) -> None:
        """Takes a training from what is left if it is finished, or cannot be done."""
        try:
            follow = [str(other.workdir) for other in work.left if _follows(other, stage)]
            if _is_finished(stage):
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
            found = results.read_result(epath.Path(stage.workdir), cli.default_config())
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


if __name__ == "__main__":
    cli.run(sweep)
