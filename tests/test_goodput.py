"""The ledger: where the time of a run went, over kills and restarts."""

import json
import statistics

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_dist.data.from_config import open_data
from mae_dist.errors import StorageFault
from mae_dist.metrics.goodput import GOODPUT_FILE, Ledger, read_starts, summarize
from mae_dist.metrics.recorder import read_metrics
from mae_dist.resilience.preemption import PreemptionSignals
from mae_dist.resilience.watchdog import Watchdog
from mae_dist.training import job, loop
from tests.runs import smoke_config


def start(workdir, from_step, began, now):
    """A ledger whose clock is `now[0]`."""
    return Ledger(workdir, from_step=from_step, total_steps=100, began=began, is_primary=True, clock=lambda: now[0])


def summary(workdir):
    return summarize(read_starts(workdir))


def test_killed_and_continued(workdir):
    """10 s of start, 80 s for 80 updates; killed after update 80, saved at 60; 30 s away; then 40 to the end."""
    now = [100.0]
    first = start(workdir, 0, 0.0, now)
    first.note(40, {"start": 10.0, "step": 40.0})
    now[0] = 190.0
    first.note(80, {"start": 10.0, "step": 80.0})
    now[0] = 230.0
    second = start(workdir, 60, 220.0, now)
    now[0] = 280.0
    second.note(100, {"start": 10.0, "step": 40.0}, "done")
    assert summary(workdir) == {
        "productive_share": round(100 / 170, 4),
        "runs": 2,
        "steps_replayed": 20,
        "secs": {"start": 20.0, "step": 100.0, "replayed": 20.0, "away": 30.0},
    }
    assert [start["began"] for start in read_starts(workdir)] == [0.0, 220.0]
    assert read_starts(workdir)[-1]["time"] == 280.0
    assert read_starts(workdir)[-1]["total_steps"] == 100


def test_notes_are_rare_but_for_the_end(workdir):
    """A line every ten seconds at most; the end is always one."""
    now = [0.0]
    ledger = start(workdir, 0, 0.0, now)
    for now[0] in (0.0, 1.0, 9.9, 10.0, 15.0):
        ledger.note(1, {"step": 1.0})
    ledger.note(2, {"step": 1.0}, "preempted")
    lines = [json.loads(line) for line in (workdir / GOODPUT_FILE).read_text().splitlines()]
    assert [(line["time"], line["end"]) for line in lines] == [(0.0, ""), (10.0, ""), (15.0, "preempted")]


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=6))
def test_clocks_may_jump(tmp_path_factory, starts):
    """Whatever the clock of a start says, no fraction leaves 0..1 and no time is negative."""
    workdir = tmp_path_factory.mktemp("ledger")
    for clock, from_step, done in starts:
        start(workdir, from_step, clock, [clock]).note(from_step + done, {"start": 1.0, "step": 2.0}, "end")
    found = summary(workdir)
    assert found["runs"] == len(starts)
    assert 0 <= found["productive_share"] <= 1
    assert all(value >= 0 for value in found["secs"].values())


def test_a_line_cut_short_is_dropped(workdir):
    """A kill in the middle of a line costs that line; corruption elsewhere is told."""
    start(workdir, 0, 0.0, [5.0]).note(3, {"step": 5.0}, "killed")
    path = workdir / GOODPUT_FILE
    path.write_text(path.read_text() + '{"run": 1, "beg')
    assert summary(workdir)["runs"] == 1
    start(workdir, 3, 6.0, [9.0]).note(4, {"step": 1.0}, "done")
    assert summary(workdir)["runs"] == 2
    path.write_text(path.read_text() + "nonsense\n")
    assert summary(workdir)["runs"] == 2
    start(workdir, 4, 9.0, [10.0]).note(5, {"step": 1.0}, "done")
    assert summary(workdir)["runs"] == 3
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(StorageFault, match="line 1 is no entry"):
        summary(workdir)


def test_without_a_ledger(workdir):
    """An older run has none; other processes than the first write none."""
    Ledger(workdir, from_step=0, total_steps=1, began=0.0, is_primary=False).note(1, {"step": 1.0}, "done")
    assert read_starts(workdir) == []
    assert summary(workdir) == {}


def test_a_line_of_an_older_version(workdir):
    """It does not say how long the run is."""
    start(workdir, 0, 0.0, [5.0]).note(3, {"step": 5.0}, "killed")
    path = workdir / GOODPUT_FILE
    path.write_text(path.read_text().replace('"total_steps": 100, ', ""))
    assert read_starts(workdir)[-1]["total_steps"] is None
    assert summary(workdir)["runs"] == 1


@pytest.mark.long
def test_the_figures_of_a_run_agree_with_its_ledger(workdir):
    """Those of speed with the time of the updates, all phases with the time that passed; saving is slow here, for real.

    Two accounts of one process are compared, and the tolerance is a share of what must not be in a rate: a machine
    that is busy with other things slows both.
    """
    config = smoke_config(
        total_steps=12,
        log_every_steps=3,
        checkpoint__every_steps=1,
        model__depth=1,
        eval__every_steps=6,
        eval__test_at_end=False,
        pictures__every_steps=0,
        pictures__every_epochs=0.0,
    )
    built = job.build(config, jax.devices()[:1], open_data(config))
    with Watchdog(**config.deadlines) as watchdog:
        assert loop.train(built, workdir, watchdog, PreemptionSignals()).status == "done"
    records = [record for record in read_metrics(workdir) if "step_secs" in record]
    line = json.loads((workdir / GOODPUT_FILE).read_text().splitlines()[-1])
    secs = line["secs"]
    assert sum(secs.values()) == pytest.approx(line["time"] - line["began"], abs=0.05)  # it has two clocks

    training, saving, evaluating = secs["step"] + secs["data"], secs["checkpoint"], secs["evaluate"]
    assert [record["step"] for record in records] == [3, 6, 9, 12]
    steps = [2, 3, 3, 3]  # the first update is compiled, and in no rate
    summed = sum(count * record["step_secs"] for count, record in zip(steps, records, strict=True))
    assert summed == pytest.approx(training, abs=0.5 * min(saving, evaluating))
    waited = sum(count * r["step_secs"] * r["data_wait"] for count, r in zip(steps, records, strict=True))
    assert waited <= secs["data"] + 0.001

    rates = [record["images_per_sec"] for record in records]
    assert rates == pytest.approx([config.global_batch_size / record["step_secs"] for record in records])
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["images_per_sec"] == statistics.median(rates)
    assert summary["goodput"]["productive_share"] == pytest.approx(secs["step"] / sum(secs.values()), abs=0.001)
    assert records[1]["eta_secs"] > 6 * (records[1]["step_secs"] + 0.25 * saving / 12)  # it counts what saving takes
