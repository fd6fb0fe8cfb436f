"""Sweeps: what is asked for, real runs that are killed and continued, and the table of what they came to."""

import csv
import json
import math
import os
import re
import shutil
import signal
import statistics
import sys
import threading
import time
from pathlib import Path

import cv2
import pytest
from absl import flags
from absl.testing import flagsaver
from etils import epath
from ml_collections import config_flags

from configs import default, quickstart
from mae_dist import cli
from mae_dist import config as config_lib
from mae_dist.errors import (
    EXIT_CONFIG,
    EXIT_DONE,
    EXIT_INTERNAL,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    ConfigError,
    StorageFault,
)
from mae_dist.metrics import results
from mae_dist.resilience.lock import workdir_lock
from mae_dist.sweep import __main__, points
from mae_dist.sweep import runner as sweep_runner
from mae_dist.sweep.table import Table, describe, read_description
from tests.runs import ONLY_UPDATES, ROOT, records, run, smoke_config, start


def trainings(out: Path) -> list[int]:
    """The processes that train in a sweep's directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:  # it ended meanwhile
            continue
        if b"mae_dist.main" in command and os.fsencode(out) in command:
            found.append(int(path.parent.name))
    return found


# --- what is asked for


def test_the_product_with_names(tmp_path):
    """Every combination under every seed, the values in the types of their fields; what cannot work says why."""
    base = quickstart.get_config()
    over = points.parse_over(["config.model.mask_ratio=.5,.6", "model.masking=random,grid"], base)
    assert over == {"model.mask_ratio": [0.5, 0.6], "model.masking": ["random", "grid"]}
    found = points.make_points(base, "F.py", {"seed": 9, "total_epochs": 3.0}, over, [4, 5], tmp_path, {})
    assert [point.name for point in found][:3] == [
        "mask_ratio=0.5,masking=random,seed=4",
        "mask_ratio=0.5,masking=random,seed=5",
        "mask_ratio=0.5,masking=grid,seed=4",
    ]
    assert len(found) == 8
    faults = {point.name: point.fault for point in found if point.fault}
    assert list(faults) == [f"mask_ratio=0.6,masking=grid,seed={seed}" for seed in (4, 5)]
    assert "cannot remove model.mask_ratio=0.6 of a 4x4 patch grid" in faults["mask_ratio=0.6,masking=grid,seed=4"]
    stage = found[3].stages[0]
    assert (stage.config.model.masking, stage.config.seed, stage.workdir) == ("grid", 5, tmp_path / found[3].name)
    assert stage.arguments == (
        "--config=F.py",
        "--config.seed=5",
        "--config.total_epochs=3.0",
        "--config.model.mask_ratio=0.5",
        "--config.model.masking=grid",
    )


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of config_flags
def test_what_follows_is_the_recipe_of_the_point(tmp_path, monkeypatch):
    """A probe of each point's own encoder; its command line gives exactly the config that the recipe made."""
    base = quickstart.get_config()
    base.model.masking = "block"
    then = {"probe": {"total_epochs": "7"}, "scratch": {}}
    (point,) = points.make_points(base, "F.py", {}, {"model.mask_ratio": [0.5]}, [3], tmp_path, then)
    first, stage, scratch = point.stages
    assert stage.workdir == tmp_path / "mask_ratio=0.5,seed=3,probe"
    assert (stage.config.task, stage.config.init_from, stage.config.seed) == ("probe", str(first.workdir), 3)
    assert (stage.config.total_epochs, stage.config.model.masking) == (7.0, "block")
    values = flags.FlagValues()
    parsed = config_flags.DEFINE_config_file("config", flag_values=values)
    monkeypatch.setattr(
        sys, "argv", cli.with_config_path(["main", *stage.arguments])
    )  # config_flags looks for overrides there
    values(sys.argv)
    assert config_lib.differences(parsed.value, stage.config, ignore=()) == []
    assert base.task == first.config.task == "pretrain"
    assert (scratch.config.init_from, scratch.workdir) == ("", tmp_path / "seed=3,scratch")


def test_a_baseline_without_masking_is_one_for_all(tmp_path):
    """From nothing, it is the same training for every masking, and is done at the first point that can work."""
    base = quickstart.get_config()
    over = points.parse_over(["model.mask_ratio=0.6,.5,.75", "model.masking=grid,random", "model.depth=1,2"], base)
    found = points.make_points(base, "F.py", {}, over, [0, 1], tmp_path, {"finetune": {}, "scratch": {}})
    scratch = {point.stages[2].workdir.name for point in found}
    assert scratch == {f"depth={depth},seed={seed},scratch" for depth in (1, 2) for seed in (0, 1)}
    for one in {point.stages[2].workdir: point.stages[2] for point in found}.values():
        same = [point.stages[2] for point in found if point.stages[2].workdir == one.workdir]
        assert len(same) == 6
        assert all(other.arguments == one.arguments and other.config == one.config for other in same)
    assert found[0].fault
    trainings = sweep_runner.trainings([point for point in found if not point.fault])
    names = [stage.name for stages in trainings.values() for stage in stages]
    assert [names.count(name) for name in ("pretrain", "finetune", "scratch")] == [20, 20, 4]
    assert len({len(point.stages) for point in found}) == 1


def test_values_of_all_types(tmp_path):
    """Tuples are one value; a name that two fields share is written out."""
    base = default.get_config()
    over = points.parse_over(["model.patch_size=(2, 2),(4,4)", "eval.every_steps=1", "pictures.every_steps=1"], base)
    assert over["model.patch_size"] == [(2, 2), (4, 4)]
    found = points.make_points(base, "F.py", {}, over, [0], tmp_path, {})
    assert found[0].name == "patch_size=2x2,eval.every_steps=1,pictures.every_steps=1,seed=0"


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["model.mask_rati=.5"], "no field 'model.mask_rati'. Did you mean 'model.mask_ratio'?"),
        (["model.mask_ratio=half"], "model.mask_ratio=half is no float, as 0.75 is"),
        (["model.depth=1.5"], "model.depth=1.5 is no int, as 3 is"),
        (["model.depth"], "write --over config.section.field=value"),
        (["seed=1,2"], "--seeds sets the seeds"),
        (["model.depth=1", "config.model.depth=2"], "named twice"),
        (["model.mask_ratio=.5,0.50"], "a value is named twice"),
    ],
)
def test_wrong_fields_and_values(texts, words):
    """Found before anything runs."""
    with pytest.raises(ConfigError) as error:
        points.parse_over(texts, default.get_config())
    assert words in str(error.value)


def test_cores_are_split(scripted, tmp_path):
    """Each gets its own, all are given; a child sees only its part. More parts than cores are refused."""
    cores = sorted(os.sched_getaffinity(0))
    parts = sweep_runner.split_cores(len(cores))
    assert sorted(core for part in parts for core in part) == cores
    assert sweep_runner.split_cores(1) == [cores]
    with pytest.raises(ConfigError, match=f"--jobs={len(cores) + 1}: each needs a core"):
        sweep_runner.split_cores(len(cores) + 1)
    show = f"{sys.executable} -S -c 'import os; print(sorted(os.sched_getaffinity(0)))'"
    runner = scripted(f"{show}; sleep 0.3", show, cores=parts[-2:])
    assert runner.run() == EXIT_DONE
    shown = [(tmp_path / name / "log.txt").read_text().splitlines()[-1] for name in "01"]
    assert sorted(shown) == sorted(map(str, parts[-2:]))
    assert sorted(os.sched_getaffinity(0)) == cores


# --- runs


@pytest.mark.long
def test_killed_and_continued(child_env, tmp_path, monkeypatch):
    """kill -9 of the sweep takes its runs along; the same line continues one, and says why the other failed."""
    out = tmp_path / "sweep"
    args = (
        "--config=configs/smoke.py",
        *ONLY_UPDATES,
        "--config.eval.test_at_end=True",
        "--config.total_steps=300",
        "--config.log_every_steps=10",
        "--config.checkpoint.every_steps=50",
        "--config.data.num_examples=64",
        "--over=config.data.val_split=test,nowhere",
        "--jobs=2",
        f"--out={out}",
    )
    good, bad = "val_split=test,seed=0", "val_split=nowhere,seed=0"
    process = start(child_env(), *args, module="sweep")
    deadline = time.monotonic() + 120
    while not (out / good / "checkpoints" / "50").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(StorageFault, match="in use by another run"), workdir_lock(epath.Path(out)):
        pass
    assert trainings(out / good)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    deadline = time.monotonic() + 5
    while trainings(out) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not trainings(out)
    assert not (out / good / "summary.json").exists()

    code, output = run(child_env(), *args, module="sweep")
    assert code == EXIT_INTERNAL, output
    log = (out / good / "log.txt").read_text()
    assert log.count("Continuing from step") == 1
    assert [record["step"] for record in records(out / good)] == list(range(10, 301, 10))
    summary = json.loads((out / good / "summary.json").read_text())
    assert f"{good}: pretrain took" in output
    assert f"test_loss {summary['test_loss']:.4f}" in output
    assert f"FAILED {bad}: pretrain, code 2; the end of" in output
    assert "'nowhere' is not one of train, test" in output
    table = json.loads((out / "table.json").read_text())
    assert [row["seeds"] for row in table] == [1, 0]
    assert table[0]["metrics"]["test_loss"]["values"] == [summary["test_loss"]]

    # Once more, what is finished is left as it is; another length of the run is not finished.
    config = smoke_config(**{"data__val_split": "test", "total_steps": 300})
    stored = config_lib.from_json((out / good / "config.json").read_text())
    for steps, finished in ((300, True), (301, False)):
        stored.total_steps = steps
        assert sweep_runner.is_finished(points.Stage("pretrain", out / good, stored, ())) is finished
    assert not sweep_runner.is_finished(points.Stage("pretrain", out / good, config, ()))  # evaluates, for one


def stage_of(workdir, script, init_from: object = ""):
    """A training that is a shell script; see `scripted`."""
    config = default.get_config()
    config.init_from = str(init_from)
    return points.Stage(script, workdir, config, ())


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """`scripted(*points)`: a runner of points of shell scripts, whose attempts go to log.txt of their workdirs.

    The workdir of a point's first is named by its number, and what begins from it by that, a comma and another number.
    """
    monkeypatch.setattr(sweep_runner, "command", lambda stage: ["sh", "-c", f"echo attempt; {stage.name}"])

    def make(*scripts, jobs=1, cores=()):
        todo = []
        for i, (first, *following) in enumerate([text] if isinstance(text, str) else text for text in scripts):
            place = tmp_path / str(i)
            follow = [stage_of(tmp_path / f"{i},{j}", text, place) for j, text in enumerate(following)]
            todo.append(points.Point(str(i), {}, 0, (stage_of(place, first), *follow), ""))
        return sweep_runner.Runner(todo, cores or [[]] * jobs)

    return make


def attempts(workdir):
    """How often a script was started."""
    log = workdir / "log.txt"
    return log.read_text().count("attempt") if log.exists() else 0


def test_codes_of_runs(scripted, tmp_path, capsys):
    """75, 76 and 77 are continued, not for ever; any other code is a failure of that point alone."""
    runner = scripted("exit 76", "exit 1", "exit 0", f"test $(wc -l < {tmp_path / '3' / 'log.txt'}) = 2 || exit 77")
    assert runner.run() == EXIT_INTERNAL
    assert [attempts(tmp_path / str(i)) for i in range(4)] == [4, 1, 1, 2]
    assert set(runner.failures) == {"0", "1"}
    assert "code 76" in runner.failures["0"]
    assert "4/4" in capsys.readouterr().out.splitlines()[-1]


def test_a_failure_takes_along_only_what_begins_from_it(tmp_path, monkeypatch):
    """A probe takes nothing, a pretraining its probes, neither the baseline."""
    monkeypatch.setattr(sweep_runner, "command", lambda stage: ["sh", "-c", f"echo attempt; {stage.name}"])
    todo = []
    for i, code in enumerate((0, 1)):
        first = stage_of(tmp_path / str(i), f"exit {code}")
        probes = [stage_of(tmp_path / f"{i},{j}", f"exit {1 - j}", first.workdir) for j in (0, 1)]
        todo.append(points.Point(str(i), {}, 0, (first, *probes, stage_of(tmp_path / f"{i},scratch", "exit 0")), ""))
    runner = sweep_runner.Runner(todo, [[]])
    assert runner.run() == EXIT_INTERNAL
    assert set(runner.failures) == {"0,0", "1"}
    assert [attempts(tmp_path / name) for name in ("0", "0,0", "0,1", "0,scratch")] == [1, 1, 1, 1]
    assert [attempts(tmp_path / name) for name in ("1", "1,0", "1,1", "1,scratch")] == [1, 0, 0, 1]


def test_faults_of_one_point_leave_the_others_alone(scripted, tmp_path):
    """A workdir that cannot be made, a log that is gone, results that cannot be read."""
    (tmp_path / "0").write_text("a file")
    broken = [tmp_path / "3", tmp_path / "4"]
    finished(broken[0])
    (broken[0] / "summary.json").write_text("[")
    late = f"echo '{{' > {broken[1] / 'config.json'}; echo '{{' > {broken[1] / 'summary.json'}"
    runner = scripted(
        ("exit 0", "exit 0"), f"rm {tmp_path / '1' / 'log.txt'}; exit 1", "exit 0", "exit 0", late, jobs=2
    )
    assert runner.run() == EXIT_INTERNAL
    assert set(runner.failures) == {"0", "1", "3"}
    assert "cannot be started: " in runner.failures["0"]
    assert "it cannot be read: " in runner.failures["1"]
    assert "summary.json in" in runner.failures["3"]
    assert [attempts(tmp_path / str(i)) for i in (2, 3, 4)] == [1, 0, 1]
    described = [{"name": str(i), "fields": {"seed": i}, "seed": 0, "fault": "", "follow": {}} for i in range(5)]
    for name in "01":
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    (tmp_path / "0").unlink(missing_ok=True)
    describe(epath.Path(tmp_path), ["seed"], [], described)
    assert __main__.show_table(epath.Path(tmp_path)) == EXIT_DONE


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, EXIT_PREEMPTED), (signal.SIGHUP, EXIT_PREEMPTED), (signal.SIGINT, EXIT_INTERRUPTED)],
    ids=["TERM", "HUP", "INT"],
)
def test_signals_are_passed_on(scripted, tmp_path, number, code, capsys, request):
    """To every run once; the sweep waits for them, begins none after, and gives back the handlers."""
    if number == signal.SIGHUP:  # ignored where these tests run under nohup
        ignored = signal.signal(number, signal.SIG_DFL)
        request.addfinalizer(lambda: signal.signal(number, ignored))
    before = signal.getsignal(number)
    wait = f"trap 'echo told; sleep 0.2; exit 75' {number}; echo ready; while :; do sleep 0.02; done"
    runner = scripted(wait, wait, "exit 0", jobs=2)

    def tell():
        logs = [tmp_path / name / "log.txt" for name in "01"]
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not all(log.exists() and "ready" in log.read_text() for log in logs):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=tell)
    thread.start()
    assert runner.run() == code
    thread.join()
    assert [(tmp_path / name / "log.txt").read_text() for name in "01"] == ["attempt\nready\ntold\n"] * 2
    assert not (tmp_path / "2").exists()
    assert signal.getsignal(number) is before
    assert "stopped with 3 points to go" in capsys.readouterr().out


# --- the outcome


def finished(workdir, *, step: float = 5, **metrics: float | None):
    """A workdir as a finished run leaves it, for the table."""
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(config_lib.to_json(default.get_config()))
    (workdir / "summary.json").write_text(json.dumps({"step": step, "total_steps": 5, **metrics}))


@pytest.mark.parametrize("older", [False, True])
def test_table_over_seeds(tmp_path, capsys, older):
    """Mean and sample deviation of what is finished, as text, CSV, JSON and figures, from the directory alone.

    Of whole splits: the accuracy of the last training batch is none of its figures. An older sweep.json does not say
    where what follows lies.
    """
    out = epath.Path(tmp_path / "sweep")
    described = []
    losses = {"0.25": [0.5, 0.7, 0.3], "0.5": [0.1, 0.2, 0.9]}
    for ratio, values in losses.items():
        for seed, loss in enumerate(values):
            name = f"mask_ratio={ratio},seed={seed}"
            fields, follow = {"model.mask_ratio": float(ratio)}, {"probe": f"{name},probe"}
            described.append({"name": name, "fields": fields, "seed": seed, "fault": "", "follow": follow})
            done = (ratio, seed) != ("0.5", 2)
            finished(tmp_path / "sweep" / name, step=5 if done else 4, val_loss=loss, val_knn_top1=None)
            if ratio == "0.25":
                figures = {"top1": 0.99, "train_top1": loss + 0.2, "test_top1": loss + 0.1, "val_loss": 9}
                finished(tmp_path / "sweep" / f"{name},probe", **figures)
    fields, follow = {"model.mask_ratio": 1.5}, {"probe": "none,probe"}
    described.append({"name": "none", "fields": fields, "seed": 0, "fault": "keeps nothing", "follow": follow})
    if older:
        described = [{name: value for name, value in point.items() if name != "follow"} for point in described]
    describe(out, ["model.mask_ratio"], ["probe"], described)
    assert __main__.show_table(out) == EXIT_DONE
    lines = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    std = statistics.stdev(losses["0.25"])
    assert lines[:4] == [
        ["mask_ratio", "seeds", "val_loss", "probe_train_top1", "probe_test_top1"],
        ["0.25", "3/3", f"0.5000 ± {std:.4f}", f"0.7000 ± {std:.4f}", f"0.6000 ± {std:.4f}"],
        ["0.5", "2/3", f"0.1500 ± {statistics.stdev([0.1, 0.2]):.4f}", "-", "-"],
        ["1.5", "cannot work", "-", "-", "-"],
    ]
    with open(out / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model.mask_ratio"] for row in rows] == ["0.25", "0.5", "1.5"]
    assert float(rows[0]["val_loss_std"]) == std
    assert [row["val_loss_count"] for row in rows] == ["3", "2", ""]
    stored = json.loads((out / "table.json").read_text())
    assert stored[1]["metrics"]["val_loss"]["values"] == [0.1, 0.2]
    picture = cv2.imread(str(out / "figures" / "model.mask_ratio.png"))
    assert picture is not None
    assert picture.std() > 0


def test_one_seed_has_no_deviation():
    """Not 0, which would claim certainty."""
    assert math.isnan(results.spread([0.5]).std)
    assert str(results.spread([0.5])) == "0.5000"


def test_spare_panels_and_runs_without_figures(tmp_path):
    """Four figures take two rows of three panels, of which two are not drawn; a run that evaluated nothing counts."""
    figures = {"val_loss": 1.0, "test_loss": 1.0, "val_top1": 0.5, "test_top1": 0.5}
    described = []
    for i, metrics in enumerate((figures, {})):
        finished(tmp_path / str(i), **metrics)
        described.append({"name": str(i), "fields": {"model.depth": i}, "seed": 0, "fault": "", "follow": {}})
    describe(epath.Path(tmp_path), ["model.depth"], [], described)
    description = read_description(epath.Path(tmp_path))
    assert description is not None
    table = Table(description, lambda name: results.read_result(epath.Path(tmp_path) / name))
    assert [row.num_finished for row in table.rows] == [1, 1]
    panels = table.figure("model.depth").axes
    assert [panel.axison for panel in panels] == [True] * 4 + [False] * 2


def test_what_follows_a_shorter_pretraining_is_not_taken(scripted, tmp_path):
    """A probe of what the pretraining was before it was made longer would stand for the longer one."""
    finished(tmp_path / "0,0")
    runner = scripted(("exit 0", "exit 0"), ("exit 0", "exit 0"))
    assert runner.run() == EXIT_INTERNAL
    assert re.search(r"0 is not finished.*delete .*0,0 first", runner.failures["0"])
    assert [attempts(tmp_path / name) for name in ("0", "0,0", "1", "1,0")] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("field", "value", "is_finished"),
    [
        ("deadlines.step_secs", 1.0, True),
        ("data.data_dir", "/elsewhere", True),
        ("mesh.data", 1, True),
        ("checkpoint.keep_latest", 7, True),
        ("log_every_steps", 1, True),
        ("total_epochs", 7.0, False),
        ("total_steps", 7, False),
        ("eval.test_at_end", False, False),
        ("online.k", 7, False),
        ("init_from", "/elsewhere", False),
        ("optim.base_lr", 1.0, False),
    ],
)
def test_what_makes_a_finished_training_another(tmp_path, field, value, is_finished):
    """What its result depends on; not where and how it was carried out."""
    finished(tmp_path / "0")
    config = default.get_config()
    config.update_from_flattened_dict({field: value})
    assert sweep_runner.is_finished(points.Stage("pretrain", tmp_path / "0", config, ())) is is_finished


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of config_flags
def test_points_that_cannot_work_are_failures(tmp_path, monkeypatch, capsys):
    """In the list at the end and in the exit code; the config itself need not be able to work."""
    argv = ["sweep", "--config=configs/smoke.py", "--config.model.mask_ratio=2.0", "--config.model.masking=grid"]
    monkeypatch.setattr(sys, "argv", argv)  # config_flags looks for overrides there
    monkeypatch.setattr(sweep_runner, "command", lambda stage: ["true"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    with flagsaver.flagsaver():
        cli.parse_flags([argv[0], f"--config={ROOT / 'configs' / 'smoke.py'}", *argv[2:]])
        with flagsaver.flagsaver(over=["model.mask_ratio=.6,.75"]):
            assert __main__.sweep([]) == EXIT_CONFIG
    assert "FAILED mask_ratio=0.6,seed=0: cannot work: model.masking" in capsys.readouterr().out.splitlines()[-1]
    assert (tmp_path / "runs" / "sweep_smoke" / "mask_ratio=0.75,seed=0" / "log.txt").exists()


@pytest.mark.long
def test_a_sweep_with_what_follows(child_env, tmp_path):
    """Pretrainings, a probe of each and one baseline for both; once more, nothing is left to do."""
    out = tmp_path / "sweep"
    args = (
        "--config=configs/smoke.py",
        *ONLY_UPDATES,
        "--config.eval.test_at_end=True",
        "--config.total_steps=2",
        "--config.model.depth=1",
        "--config.data.num_examples=64",
        "--over=config.model.mask_ratio=.5,.75",
        "--then=probe,scratch",
        "--set=probe.total_steps=3",
        "--set=scratch.total_steps=3",
        f"--out={out}",
    )
    code, output = run(child_env(), *args, module="sweep")
    assert code == EXIT_DONE, output
    names = {path.name for path in out.iterdir() if path.is_dir()}
    ratios = [f"mask_ratio={ratio},seed=0" for ratio in (0.5, 0.75)]
    assert names == {*ratios, *(f"{name},probe" for name in ratios), "seed=0,scratch", "figures"}
    for name in ratios:
        stored = json.loads((out / f"{name},probe" / "config.json").read_text())
        assert stored["init_from"] == str(out / name)
    accuracy = json.loads((out / "seed=0,scratch" / "summary.json").read_text())["test_top1"]
    table = json.loads((out / "table.json").read_text())
    assert [row["metrics"]["scratch_test_top1"]["values"] for row in table] == [[accuracy]] * 2
    assert all("probe_test_top1" in row["metrics"] for row in table)
    before = (out / "table.json").read_text()
    code, output = run(child_env(), *args, "--config.deadlines.step_secs=500", module="sweep")
    assert (code, output.count(" began")) == (EXIT_DONE, 0), output
    assert (out / "table.json").read_text() == before


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"then": ["prob"]}, "--then=prob is not one of probe, finetune, scratch"),
        ({"then": ["probe"], "set": ["scratch.total_epochs=1"]}, "--set=scratch.total_epochs=1: write <recipe>."),
        ({"over": ["model.mask_ratio=1.5"]}, "no point of the sweep can work"),
        ({"jobs": 10_000}, "--jobs=10000: each needs a core"),
        ({"table": True}, "is not the directory of a sweep"),
        ({"out": "gs://bucket/sweep"}, "a sweep is kept on a disk"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of config_flags
def test_wrong_flags(tmp_path, monkeypatch, values, words):
    """One message with the cure, and nothing written."""
    argv = ["sweep", "--config=configs/smoke.py"]
    monkeypatch.setattr(sys, "argv", argv)  # config_flags looks for overrides there
    with flagsaver.flagsaver():
        cli.parse_flags(argv)
        with flagsaver.flagsaver(**{"out": str(tmp_path / "out"), **values}), pytest.raises(ConfigError) as error:
            __main__.sweep([])
    assert words in str(error.value)
    assert list(tmp_path.iterdir()) == []
