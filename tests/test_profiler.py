"""Traces of updates, of real runs."""

import concurrent.futures
import gzip
import json
import signal
import time

import pytest
from etils import epath

from mae_dist.config.checks import parse_steps
from mae_dist.errors import ConfigError
from mae_dist.training.profiler import Profiler
from tests.runs import ONLY_UPDATES, last_step, records, run, start, wait_for_step

SMOKE = ("--config=configs/smoke.py", *ONLY_UPDATES, "--config.checkpoint.every_steps=1000")


def updates_in(directory):
    """The updates that a trace names."""
    (path,) = directory.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    named = [event["args"]["step_num"] for event in events if event.get("name") == "update"]
    return sorted({int(step) for step in named}), {event.get("name", "") for event in events}


def test_steps_of_a_config():
    assert list(parse_steps("10:12")) == [10, 11, 12]
    assert list(parse_steps("3:3")) == [3]
    assert not parse_steps("")


@pytest.mark.parametrize("steps", ["10", "0:3", "5:4", "a:b", "1:2:3", ":"])
def test_steps_that_are_none(steps):
    with pytest.raises(ConfigError, match=r"profile_steps=.*10:15"):
        parse_steps(steps)


@pytest.mark.long
def test_traces_the_updates_of_the_config_and_changes_nothing(child_env, tmp_path):
    """The trace holds those updates and what they computed; every recorded value is that of a run without it."""
    for name, steps in (("plain", ""), ("traced", "4:5")):
        code, output = run(
            child_env(),
            *SMOKE,
            "--config.total_steps=10",
            f"--config.profile_steps={steps}",
            f"--workdir={tmp_path}/{name}",
        )
        assert code == 0, output
    found, names = updates_in(tmp_path / "traced" / "profile" / "process_0" / "updates_4_5")
    assert found == [4, 5]
    assert any("dot" in name for name in names)
    assert not (tmp_path / "plain" / "profile").exists()
    assert records(tmp_path / "traced") == records(tmp_path / "plain")


def test_in_another_thread(tmp_path):
    """As a library's: what a run in a thread enters must not touch signals, which belong to the main thread."""
    before = signal.getsignal(signal.SIGUSR1)

    def enter():
        with Profiler(epath.Path(tmp_path), "", on_signal=True) as profiler:
            return signal.getsignal(signal.SIGUSR1) == before and not profiler.ends_with(1)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        assert pool.submit(enter).result()
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.long
def test_a_signal_asks_for_the_next_updates(child_env, tmp_path):
    process = start(child_env(), *SMOKE, "--config.total_steps=400", f"--workdir={tmp_path}")
    wait_for_step([process], tmp_path, 5)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    (directory,) = (tmp_path / "profile" / "process_0").iterdir()
    first, last = map(int, directory.name.removeprefix("updates_").split("_"))
    assert last - first == 4
    assert updates_in(directory)[0] == list(range(first, last + 1))


@pytest.mark.long
def test_a_signal_before_and_after_the_updates_is_harmless(child_env, tmp_path):
    """Whoever asks a job that still starts, or already ends, must not end it."""
    process = start(child_env(), *SMOKE, "--config.total_steps=2", f"--workdir={tmp_path}")
    assert process.stdout is not None
    output = process.stdout.readline()  # long before there are updates
    while not (tmp_path / "config.json").exists() and process.poll() is None:
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.05)
    while process.poll() is None:
        if last_step(tmp_path) == 2:
            process.send_signal(signal.SIGUSR1)
        time.sleep(0.05)
    output += process.communicate()[0]
    assert process.returncode == 0, output
    assert "step 2 of 2" in output
