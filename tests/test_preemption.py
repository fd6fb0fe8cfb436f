"""Preemption signals, dead and stalled peers, other topologies: real processes, real signals."""

import contextlib
import ctypes
import json
import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from mae_dist.errors import EXIT_DONE, EXIT_PEER_LOST, EXIT_PREEMPTED, EXIT_STALLED, EXIT_STORAGE, ConfigError
from mae_dist.resilience.preemption import Preempted, PreemptionSignals
from tests.runs import (
    ONLY_UPDATES,
    checkpoint_arrays,
    end_of,
    last_step,
    records,
    run,
    start,
    start_processes,
    wait_for_step,
)

ARGS = (
    "--config=configs/smoke.py",
    "--config.total_steps=40",
    "--config.log_every_steps=1",
    "--config.checkpoint.every_steps=0",
    "--config.eval.every_steps=10",
    "--config.eval.batch_size=8",
    "--config.data.augment=crop_flip",
    "--config.model.drop_path=0.1",
    "--config.pictures.every_epochs=0",
    "--config.pictures.every_steps=0",
    "--config.trace=True",
)
# Updates without end, for what is to be interrupted.
LONG = (*ARGS, *ONLY_UPDATES, "--config.total_steps=100000")


@pytest.fixture(scope="module")
def uninterrupted(child_env, tmp_path_factory):
    """The records of a run of 40 updates, never told anything."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    code, output = run(child_env(), *ARGS, f"--workdir={workdir}")
    assert code == EXIT_DONE, output
    return workdir


def child_of(process):
    """The process number of a data worker."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        threads = Path(f"/proc/{process.pid}/task").glob("*/children")
        found = [int(pid) for thread in threads for pid in thread.read_text().split()]
        workers = [pid for pid in found if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
        if workers:
            return workers[-1]
        time.sleep(0.05)
    raise AssertionError("no worker process")


@pytest.mark.parametrize(
    "starts",
    [
        pytest.param(((2, 14),), id="2-1"),
        pytest.param(((1, 7), (2, 14), (4, 24)), id="1-2-4-1", marks=pytest.mark.long),
    ],
)
def test_another_topology_sees_the_same_examples_and_masks(uninterrupted, child_env, tmp_path, draw, starts):
    """That many processes, each start preempted by way of any one of them: every trace and every loss as alone."""
    workdir = tmp_path / "run"
    saved = 0
    for count, lowest in starts:
        # What a user tries; of the first start only.
        simulated = ("--simulate_preemption_at_step=7",) if starts[0][0] == 1 else ()
        processes = start_processes(child_env(), count, *ARGS, *simulated, f"--workdir={workdir}")
        if count > 1:
            wait_for_step(processes, workdir, max(saved + 2, lowest))
            draw.choice(processes).send_signal(signal.SIGTERM)
        ended = end_of(processes)
        assert [code for code, _ in ended] == [EXIT_PREEMPTED] * count, "\n".join(output for _, output in ended)
        steps = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
        assert f"Preempted: saved step {max(steps)};" in ended[0][1]
        assert max(steps) in (last_step(workdir), last_step(workdir) + 1)  # one more: told within its evaluation
        saved = max(steps)
    code, output = run(child_env(), *ARGS, f"--workdir={workdir}")
    assert code == EXIT_DONE, output
    ours, theirs = records(workdir), records(uninterrupted)
    assert [record["step"] for record in ours] == list(range(1, 41))
    assert [record["trace"] for record in ours] == [record["trace"] for record in theirs]
    assert len({record["trace"] for record in theirs}) == 40
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose([a[name] for name in b], [b[name] for name in b], rtol=1e-4)
    goodput = json.loads((workdir / "summary.json").read_text())["goodput"]
    assert goodput["runs"] == len(starts) + 1
    assert goodput["steps_replayed"] == 0
    assert 0 < goodput["productive_share"] < 1


@pytest.mark.long
def test_told_within_an_evaluation(child_env, tmp_path):
    """It is left, and done after the restart: nothing is missing, all is equal, the log line included."""
    args = (*ARGS, "--config.data.num_examples=20000", "--config.total_steps=12")
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    code, output = run(child_env(), *args, f"--workdir={whole}")
    assert code == EXIT_DONE, output
    process = start(child_env(), *args, f"--workdir={workdir}")
    wait_for_step([process], workdir, 9)
    time.sleep(0.5)  # 4000 examples in batches of 8 take longer
    process.send_signal(signal.SIGTERM)
    [(code, output)] = end_of([process])
    assert code == EXIT_PREEMPTED, output
    assert last_step(workdir) == 9, "the evaluation was finished: too short for this test"
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["10"]
    code, output = run(child_env(), *args, f"--workdir={workdir}")
    assert code == EXIT_DONE, output
    assert records(workdir) == records(whole)
    assert "val_loss" in records(workdir)[9]
    for a, b in zip(checkpoint_arrays(workdir), checkpoint_arrays(whole), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.long
def test_told_while_it_waits_for_data(child_env, tmp_path):
    """The worker that makes the batches hangs; what is done is saved all the same."""
    workdir = tmp_path / "run"
    process = start(child_env(), *LONG, "--config.data.num_workers=1", f"--workdir={workdir}")
    wait_for_step([process], workdir, 5)
    worker = child_of(process)
    os.kill(worker, signal.SIGSTOP)
    time.sleep(2)  # until what lay ready is used up
    process.send_signal(signal.SIGTERM)
    try:
        [(code, output)] = end_of([process], timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    assert code == EXIT_PREEMPTED, output
    assert (workdir / "checkpoints" / str(last_step(workdir))).is_dir()


@pytest.mark.long
def test_stalled_data_ends_the_run(child_env, tmp_path):
    """Past its deadline a wait ends with a code of its own, and says where it hung."""
    workdir = tmp_path / "run"
    options = ("--config.data.num_workers=1", "--config.deadlines.data_secs=12")
    process = start(child_env(), *LONG, *options, f"--workdir={workdir}")
    wait_for_step([process], workdir, 5)
    worker = child_of(process)
    os.kill(worker, signal.SIGSTOP)
    try:
        [(code, output)] = end_of([process], timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    assert code == EXIT_STALLED, output
    assert "no progress in phase 'data'" in output
    assert "deadlines.data_secs" in output
    assert "in batches" in output, "no stacks"


@pytest.mark.parametrize(
    ("number", "victim"), [(signal.SIGKILL, 0), pytest.param(signal.SIGSTOP, 1, marks=pytest.mark.long)]
)
def test_peer_lost(child_env, tmp_path, number, victim):
    """One of two is killed or stopped: the other ends in time, says who is gone and what was last known."""
    workdir = tmp_path / "run"
    args = (*LONG, "--config.deadlines.peer_secs=5", f"--workdir={workdir}")
    processes = start_processes(child_env(), 2, *args)
    wait_for_step(processes, workdir, 5)
    began = time.monotonic()
    processes[victim].send_signal(number)
    other = processes[1 - victim]
    try:
        [(code, output)] = end_of([other], timeout=60)
    finally:
        processes[victim].kill()
        processes[victim].communicate()
    assert code == EXIT_PEER_LOST, output
    assert time.monotonic() - began < 30
    assert f"lost process {victim}" in output
    assert f"process {victim}: phase" in output
    assert "Current thread" in output or "Thread 0x" in output, "no stacks"


class Metadata(BaseHTTPRequestHandler):
    """Google's metadata server, as far as preemption goes."""

    answers: ClassVar = {"preempted": "FALSE", "maintenance-event": "NONE"}

    def do_GET(self):
        assert self.headers["Metadata-Flavor"] == "Google"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.answers[self.path.removeprefix("/computeMetadata/v1/instance/")].encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def metadata(monkeypatch):
    """The answers of a metadata server, to be changed, and its address."""
    monkeypatch.setattr(Metadata, "answers", dict(Metadata.answers))
    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Metadata.answers, f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.long
def test_told_by_the_metadata_server(child_env, tmp_path, metadata):
    """As by SIGTERM; the address is the one given."""
    answers, address = metadata
    workdir = tmp_path / "run"
    process = start(child_env(), *LONG, f"--metadata_server={address}", f"--workdir={workdir}")
    wait_for_step([process], workdir, 3)
    answers["preempted"] = "TRUE"
    [(code, output)] = end_of([process], timeout=60)
    assert code == EXIT_PREEMPTED, output
    assert "preempted (the metadata server" in output
    assert (workdir / "checkpoints" / str(last_step(workdir))).is_dir()


def test_maintenance_that_ends_the_machine(metadata):
    """It is a preemption signal; one that moves the machine elsewhere is none."""
    answers, address = metadata
    preemption = PreemptionSignals()
    with preemption.handling(address):
        answers["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
        time.sleep(2.5)
        assert not preemption.poll()
        answers["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
        with pytest.raises(Preempted), preemption.interrupting():
            time.sleep(30)
        assert preemption.poll()


@pytest.mark.long
def test_second_run_in_a_workdir_is_refused(child_env, tmp_path):
    """At once and naming the first; a killed one leaves no lock behind."""
    workdir = tmp_path / "run"
    first = start(child_env(), *LONG, f"--workdir={workdir}")
    wait_for_step([first], workdir, 3)
    code, output = run(child_env(), *LONG, f"--workdir={workdir}")
    assert code == EXIT_STORAGE, output
    assert 'in use by another run: {"host": ' in output
    assert f'"process": {first.pid}' in output
    assert first.poll() is None, "the first was disturbed"
    first.kill()
    first.communicate()
    code, output = run(child_env(), *ARGS, f"--workdir={workdir}")
    assert code == EXIT_DONE, output


def test_displaced_handler_is_refused():
    """Whoever takes SIGTERM away afterwards, in Python, in C or by blocking it, is named as a fault at the start."""
    preemption = PreemptionSignals()
    with preemption.handling(""):
        preemption.check()
        ours = signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with pytest.raises(ConfigError, match="another handler"):
            preemption.check()
        signal.signal(signal.SIGTERM, ours)
        preemption.check()
        ctypes.CDLL(None).signal(int(signal.SIGTERM), None)  # as a library would, unseen by Python
        with pytest.raises(ConfigError, match="another handler"):
            preemption.check()
        signal.signal(signal.SIGTERM, ours)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        try:
            with pytest.raises(ConfigError, match="is blocked"):
                preemption.check()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    assert signal.getsignal(signal.SIGTERM) != ours


def test_interrupts_only_where_it_may():
    """A wait is left at once, whether the signal comes before or within it; a step is not."""
    for before in (False, True):
        preemption = PreemptionSignals()
        with preemption.handling(""):
            assert not preemption.poll()
            if before:
                os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(Preempted), preemption.interrupting():  # noqa: PT012 (the signal comes within)
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            assert preemption.poll()
