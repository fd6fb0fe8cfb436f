"""Experiment trackers: each step once whatever is killed, and a training that none of them can stop or slow."""

import importlib
import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from mae_dist import config as config_lib
from mae_dist.data.from_config import open_data
from mae_dist.errors import ConfigError
from mae_dist.evaluation.pictures import write_png
from mae_dist.metrics.recorder import METRICS_FILE, Recorder
from mae_dist.resilience.preemption import PreemptionSignals
from mae_dist.resilience.watchdog import Watchdog
from mae_dist.trackers import Run, base, child, tracking
from mae_dist.training import job, loop
from tests import runs, wandb_server

NO_TRACKERS = "needs the extra `trackers`: pip install -e '.[trackers]'"
# Trackers of a user: "lines" writes what it is given to $TRACKED, the others fail as real ones do.
MODULE = """
import json
import os
import time

import mae_dist.trackers


@mae_dist.trackers.register("lines")
class Lines:
    def start(self, run):
        steps, id_ = [-1], None
        for event in map(json.loads, open(os.environ["TRACKED"])) if os.path.exists(os.environ["TRACKED"]) else ():
            id_ = event[1] if event[0] == "start" else id_
            steps += [event[1]] if event[0] == "log" and id_ == run.id else []
        self.write("start", run.id, run.name, run.config["seed"])
        return max(steps)

    def log(self, step, scalars, images):
        self.write("log", step, scalars, {name: image.shape for name, image in images.items()})
        time.sleep(0.02)

    def finish(self, status, summary):
        self.write("finish", status, summary.get("loss"))

    def write(self, *event):
        with open(os.environ["TRACKED"], "a") as file:
            print(json.dumps(event), file=file)


@mae_dist.trackers.register("hangs")
class Hangs(Lines):
    def log(self, step, scalars, images):
        super().log(step, scalars, images)
        time.sleep(1e6)


@mae_dist.trackers.register("crashes")
class Crashes(Lines):
    def log(self, step, scalars, images):
        os.abort()
"""


class Recording:
    """A tracker in this process that keeps what it is given; each method fails as often as it is told."""

    def __init__(self, has: int | None = None, **failures: int):
        self.has, self.failures, self.events = has, failures, []

    def _try(self, name: str) -> None:
        if self.failures.get(name, 0) > 0:
            self.failures[name] -= 1
            raise ConnectionError(f"{name}: no route to host")

    def start(self, run: Run) -> int | None:
        self._try("start")
        self.events.append(("start", run.last_step))
        return self.has

    def log(self, step: int, scalars: Mapping[str, float], images: Mapping[str, np.ndarray]) -> None:
        self._try("log")
        self.events.append((step, dict(scalars), {name: image.shape for name, image in images.items()}))

    def finish(self, status: str, summary: Mapping[str, Any]) -> None:
        self.events.append(("finish", status, dict(summary)))

    @property
    def steps(self) -> list[Any]:
        return [event[0] for event in self.events if isinstance(event[0], int)]


def record(workdir: epath.Path, steps: Sequence[int], start_step: int = 0) -> None:
    with Recorder(workdir, start_step=start_step, is_primary=True) as recorder:
        for step in steps:
            recorder.write_scalars(step, {"loss": math.nan if step == 2 else 1 / step})
            recorder.commit(step)


def follower_of(tracker: Any, workdir: epath.Path) -> child.Follower:
    def describe(id_: str, last_step: int) -> Run:
        return Run(id_, "run", str(workdir), str(workdir), {}, (), last_step)

    state = child.State(workdir / "trackers" / "it.json")
    return child.Follower(tracker, describe, state, workdir / METRICS_FILE, workdir / "pictures")


def test_steps_are_logged_once_in_order(workdir):
    """Pictures with their step's record, or alone; a step that was done again is not logged again."""
    record(workdir, [1, 2, 4])
    for step in (2, 3, 9):
        write_png(workdir / "pictures" / f"step_{step:08d}.png", np.zeros((2, 4, 3), np.uint8))
    tracker = Recording()
    follower = follower_of(tracker, workdir)
    follower.catch_up()
    follower.catch_up()
    (start, one, two, three, four) = tracker.events
    picture = {"reconstruction": (2, 4, 3)}
    assert (start, one, three, four) == (
        ("start", -1),
        (1, {"loss": 1.0}, {}),
        (3, {}, picture),
        (4, {"loss": 0.25}, {}),
    )
    assert two[0] == 2
    assert math.isnan(two[1]["loss"])
    assert two[2] == picture

    record(workdir, [2, 3, 4, 5], start_step=1)  # killed, and continued from step 1
    again = Recording()
    follower = follower_of(again, workdir)
    follower.catch_up()
    follower.finish("done", {"loss": 0.1})
    assert again.events == [("start", 4), (5, {"loss": 0.2}, {}), ("finish", "done", {"loss": 0.1})]
    assert json.loads((workdir / "trackers" / "it.json").read_text())["done"]


@pytest.mark.parametrize(("has", "steps"), [(1, [2, 3, 4]), (-1, [1, 2, 3, 4]), (9, []), (None, [])])
def test_what_the_tracker_has_counts(workdir, has, steps):
    """More than what was sent as far as is known here, or less: it was handed over, and the client was killed."""
    record(workdir, [1, 2, 3, 4])
    follower_of(Recording(), workdir).catch_up()
    tracker = Recording(has)
    follower_of(tracker, workdir).catch_up()
    assert tracker.steps == steps


def test_a_line_being_written_is_left(workdir):
    """Its rest comes later."""
    record(workdir, [1])
    path = workdir / METRICS_FILE
    tracker = Recording()
    follower = follower_of(tracker, workdir)
    whole = path.read_text() + '{"step": 2, "loss": 1.0}\n'
    for end, steps in ((-9, [1]), (-1, [1]), (None, [1, 2])):
        path.write_text(whole[:end])
        follower.catch_up()
        assert tracker.steps == steps


@pytest.mark.parametrize("failures", [{"start": 3}, {"log": 3}])
def test_one_that_is_down_is_sent_the_rest_later(workdir, monkeypatch, failures):
    """One warning, however often it fails; the gap is filled."""
    monkeypatch.setattr(child, "_RETRY_SECS", (0.01, 0.02))
    record(workdir, [1, 2, 3])
    tracker, commands, reports = Recording(**failures), child.Commands(), []

    def report(level: str, text: str) -> None:
        reports.append((level, text))
        if level == "info":
            commands.end = "done"

    assert child.follow("it", follower_of(tracker, workdir), commands, report, 0) == "done"
    assert tracker.steps == [1, 2, 3]
    (level, warning), (_, recovered) = reports
    assert level == "warning"
    assert "no route to host" in warning
    assert "metrics.jsonl has everything, and it is sent the rest when it answers" in warning
    assert "answers again" in recovered


def test_one_that_is_down_at_the_end(workdir):
    """Says what is lacking, and the next start sends it."""
    record(workdir, [1, 2, 3])
    commands, reports = child.Commands(), []
    commands.end = "done"
    report = lambda level, text: reports.append((level, text))  # noqa: E731
    assert child.follow("it", follower_of(Recording(log=1), workdir), commands, report, 0) is None
    assert [level for level, _ in reports] == ["warning"]
    assert "it lacks steps" in reports[0][1]
    assert "the same command sends the rest" in reports[0][1]
    tracker = Recording()
    assert child.follow("it", follower_of(tracker, workdir), commands, report, 0) == "done"
    assert tracker.steps == [1, 2, 3]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a user's `my_trackers`, and their output in its file `tracked`."""
    (tmp_path / "my_trackers.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setenv("TRACKED", str(tmp_path / "tracked"))
    monkeypatch.setattr(base.TRACKERS, "_entries", dict(base.TRACKERS._entries))
    monkeypatch.delitem(sys.modules, "my_trackers", raising=False)
    return tmp_path


def events(directory: Path) -> list[Any]:
    path = directory / "tracked"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def logged(directory: Path) -> list[int]:
    return [event[1] for event in events(directory) if event[0] == "log"]


@pytest.fixture(scope="module")
def built() -> job.Job:
    """A training of four steps on one device."""
    never = {f"{section}__every_{unit}s": 0 for section in ("eval", "pictures") for unit in ("epoch", "step")}
    config = runs.smoke_config(total_steps=4, log_every_steps=1, eval__test_at_end=False, **never)
    return job.build(config, jax.devices()[:1], open_data(config))


def train(built: job.Job, names: Sequence[str], workdir: epath.Path, preempted_at: int = 0) -> str:
    """Trains with these trackers of `my_trackers`; how it ended."""
    importlib.import_module("my_trackers")
    with built.config.unlocked():
        built.config.trackers = tuple(names)
    preemption = PreemptionSignals(preempted_at)
    with Watchdog(**built.config.deadlines) as watchdog, preemption.handling(""):
        return loop.train(built, workdir, watchdog, preemption).status


def test_a_run_that_is_preempted_and_goes_on(built, module, workdir):
    """One run of the tracker's; the command of a finished run sends what is lacking, and then nothing."""
    assert train(built, ["lines"], workdir, preempted_at=2) == "preempted"
    assert train(built, ["lines"], workdir) == "done"
    (begun, id_, name, seed), *first, end, resumed, third, fourth, done = events(module)
    assert (begun, name, seed) == ("start", "run", 0)
    assert [event[1] for event in first] == [1, 2]
    assert first[0][2]["loss"] == runs.records(workdir)[0]["loss"]
    assert end == ["finish", "preempted", None]
    assert resumed[:2] == ["start", id_]
    assert [third[1], fourth[1]] == [3, 4]
    assert done == ["finish", "done", runs.records(workdir)[-1]["loss"]]
    num_events = len(events(module))
    assert train(built, ["lines"], workdir) == "done"
    assert len(events(module)) == num_events, "it has everything"
    (workdir / "trackers" / "lines.json").unlink()
    assert train(built, ["lines"], workdir) == "done"
    assert logged(module) == [1, 2, 3, 4, 1, 2, 3, 4]


def test_none_stops_a_training(built, module, workdir, monkeypatch, caplog):
    """One that hangs, one that crashes: the training and the other tracker end as if they were not there."""
    monkeypatch.setattr(tracking, "_END_SECS", {"done": 3.0})
    with caplog.at_level("WARNING"):
        assert train(built, ["hangs", "crashes", "lines"], workdir) == "done"
    assert runs.last_step(workdir) == 4
    assert sorted(logged(module)) == [1, 1, 2, 3, 4]  # the first step of the one that hangs, too
    text = caplog.text
    assert "hangs took more than 3 s to end, after step -1: metrics.jsonl has everything, and the same command" in text
    assert "The process of crashes ended with code -6: metrics.jsonl has everything" in text
    assert "lines" not in text


def test_names_that_cannot_work(monkeypatch):
    """The nearest name, the command that installs a package, and the cure for a class of a notebook."""
    monkeypatch.setattr(base, "_is_installed", lambda name: False)
    monkeypatch.setattr(base.TRACKERS, "_entries", dict(base.TRACKERS._entries))
    for names, message in (
        (("wand",), r"trackers='wand' is not one of .*Did you mean 'wandb'\?"),
        (
            ("wandb",),
            r"wandb is not installed: pip install 'mae_dist\[wandb\]', or in a clone: pip install -e '.\[wandb",
        ),
        ("wandb", r"trackers='wandb' must be names in a tuple, such as \('wandb',\)"),
    ):
        config = runs.smoke_config()
        with config.ignore_type():
            config.trackers = names
        with pytest.raises(ConfigError, match=message):
            config_lib.validate(config)

    @base.register("mine")
    class Mine(Recording):
        pass

    assert base.TRACKERS.get("mine").make is Mine
    with pytest.raises(ConfigError, match="put the class into a module and name that in imports"):
        runs.smoke_config(trackers=("mine",))


def test_a_directory_is_no_package(tmp_path, monkeypatch):
    """W&B writes one called `wandb` where a training is started."""
    (tmp_path / "a_directory_of_runs").mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert not base._is_installed("a_directory_of_runs")
    assert base._is_installed("numpy")


def test_trackers_may_change():
    """Old checkpoints know none, and no number depends on them."""
    old = json.loads(config_lib.to_json(runs.smoke_config()))
    del old["trackers"]
    assert config_lib.from_json(json.dumps(old)).trackers == ()
    new = runs.smoke_config()
    new.trackers = ("wandb",)
    assert config_lib.differences(old, new) == []


# Trainings that are killed, each with a step every 20 ms or so.
ARGS = (
    "--config=configs/smoke.py",
    *runs.ONLY_UPDATES,
    "--config.log_every_steps=1",
    "--config.checkpoint.every_steps=10",
)


def env_of(child_env: Callable[..., dict[str, str]], directory: Path, **more: str) -> dict[str, str]:
    """The environment of a training whose tracker keeps everything in `directory`."""
    env = child_env()
    offline = {
        "PYTHONPATH": f"{env['PYTHONPATH']}:{directory}",
        "TRACKED": str(directory / "tracked"),
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"sqlite:///{directory}/mlflow.db",
        "TRACKIO_DIR": str(directory / "trackio"),
    }
    return env | offline | more


def descendants(pid: int) -> Iterator[int]:
    """The processes that a process has started, and they."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    for line in listed.splitlines():
        number, parent = map(int, line.split())
        if parent == pid:
            yield number
            yield from descendants(number)


def kill_when_tracked(process: subprocess.Popen[str], workdir: Path, name: str, step: int, everything: bool) -> None:
    """Sends SIGKILL when a tracker has a step; to the processes of the trackers as well, as where a machine is lost."""
    state, deadline = workdir / "trackers" / f"{name}.json", time.monotonic() + 120
    while not state.exists() or json.loads(state.read_text())["step"] < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "nothing is sent"
        time.sleep(0.01)
    for pid in [process.pid, *(descendants(process.pid) if everything else ())]:
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=20)  # the output is closed: nothing of the trackers holds it


def steps_of(name: str, directory: Path, workdir: Path) -> list[int]:
    """The steps that the client has, in its order."""
    if name == "lines":
        return logged(directory)
    if name == "wandb":
        files = sorted((workdir / "trackers" / "wandb").glob("offline-run-*/*.wandb"))
        return [step for path in files for step in wandb_steps(path)]
    if name == "mlflow":
        code = """if True:
            import mlflow
            client = mlflow.MlflowClient()
            (run,) = client.search_runs([client.get_experiment_by_name("mae_dist").experiment_id])
            assert run.info.status == "FINISHED", run.info.status
            print([metric.step for metric in client.get_metric_history(run.info.run_id, "loss")])
        """
        env = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{directory}/mlflow.db"}
        return json.loads(subprocess.run([sys.executable, "-c", code], env=env, **CAPTURED).stdout)
    command = [sys.executable, "-m", "trackio.cli", "query", "project", "--project", "mae_dist", "--json"]
    command += ["--sql", "select step, run_name from metrics order by id"]
    env = os.environ | {"TRACKIO_DIR": str(directory / "trackio")}
    rows = json.loads(subprocess.run(command, env=env, **CAPTURED).stdout)["rows"]
    assert len({row["run_name"] for row in rows}) == 1
    return [row["step"] for row in rows]


CAPTURED: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "check": True, "cwd": "/"}


def wandb_steps(path: Path) -> Iterator[int]:
    """The steps in a file of W&B's: a LevelDB log, blocks of 32 KiB, of protocol buffers."""
    messages = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            parsed = messages.Record.FromString(record)
            record = b""
            if parsed.WhichOneof("record_type") == "history":
                yield parsed.history.step.num


@pytest.mark.long
def test_only_the_first_process_tracks(child_env, module, workdir):
    """Two make the same calls, and one run has each step once."""
    args = (*ARGS, '--config.imports=("my_trackers",)', '--config.trackers=("lines",)', f"--workdir={workdir}")
    ended = runs.end_of(runs.start_processes(env_of(child_env, module), 2, *args))
    assert [code for code, _ in ended] == [0, 0], ended
    assert logged(module) == list(range(1, 21))


@pytest.mark.long
@pytest.mark.parametrize("everything", [False, True], ids=["training", "everything"])
@pytest.mark.parametrize("name", ["lines", "wandb", "mlflow", "trackio"])
def test_killed_and_continued(name, everything, child_env, module, tmp_path):
    """The real clients, with their files on this machine: after two kills each step is there once."""
    if name != "lines" and not base._is_installed(name):
        pytest.skip(f"{name} {NO_TRACKERS}")
    workdir, env = tmp_path / "run", env_of(child_env, module)
    args = (*ARGS, '--config.imports=("my_trackers",)', f'--config.trackers=("{name}",)', f"--workdir={workdir}")
    for step in (5, 30):
        process = runs.start(env, *args, "--config.total_steps=5000")
        kill_when_tracked(process, workdir, name, step, everything)
    total = runs.last_step(workdir) + 40
    for _ in range(5):  # an end waits for half a minute, and the same command sends the rest
        code, output = runs.run(env, *args, f"--config.total_steps={total}")
        assert code == 0, output
        if "the same command sends the rest" not in output:
            break
    assert f"{name} has every step to {total}" in output
    assert steps_of(name, module, workdir) == list(range(1, total + 1))


@pytest.mark.long
def test_wandb_online_continues_from_what_the_server_has(child_env, module, tmp_path):
    """The client uploads every 15 s: where it is killed between, the server lacks what was handed over."""
    if not base._is_installed("wandb"):
        pytest.skip(f"wandb {NO_TRACKERS}")
    workdir = tmp_path / "run"
    with wandb_server.serving() as server:
        online = {"WANDB_MODE": "online", "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40}
        env = env_of(child_env, module, **online)
        args = (*ARGS, '--config.trackers=("wandb",)', f"--workdir={workdir}")
        process = runs.start(env, *args, "--config.total_steps=100000")
        deadline = time.monotonic() + 120
        while not server.steps:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "nothing is uploaded"
            time.sleep(0.1)
        kill_when_tracked(process, workdir, "wandb", len(server.steps) + 20, everything=True)
        uploaded = len(server.steps)
        total = runs.last_step(workdir) + 10
        code, output = runs.run(env, *args, f"--config.total_steps={total}")
    assert code == 0, output
    assert f"wandb has every step to {total}: {server.url}/us/mae_dist/runs/" in output
    assert 0 < uploaded < total - 20
    assert server.steps == list(range(1, total + 1))
    assert server.exit_codes == [0]


@pytest.mark.long
def test_wandb_leaves_exit_codes_and_signals_alone(child_env, module, tmp_path):
    """A preemption is a preemption, and a server that does not answer costs one warning."""
    if not base._is_installed("wandb"):
        pytest.skip(f"wandb {NO_TRACKERS}")
    workdir, env = tmp_path / "run", env_of(child_env, module)
    args = (*ARGS, '--config.trackers=("wandb",)', f"--workdir={workdir}")
    process = runs.start(env, *args, "--config.total_steps=5000")
    runs.wait_for_step([process], workdir, 5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    total = runs.last_step(workdir) + 5
    away = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    code, output = runs.run(env | away, *args, f"--config.total_steps={total}")
    assert code == 0, output
    assert f"step {total} of {total}" in output
    assert output.count("metrics.jsonl has everything") == 1, output
    assert "the same command sends the rest" in output
    code, output = runs.run(env, *args, f"--config.total_steps={total}")
    assert code == 0, output
    assert steps_of("wandb", module, workdir) == list(range(1, total + 1))
