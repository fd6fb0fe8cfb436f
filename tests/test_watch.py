"""Phases and deadlines. Ends of processes by it: tests/test_preemption.py."""

import contextlib
import multiprocessing
import signal
import subprocess
import sys
import time

import pytest

from mae_dist.errors import EXIT_PEER_LOST, EXIT_STALLED
from mae_dist.resilience.watchdog import Watchdog, Workers, kill_workers
from tests.runs import free_port, start_processes
from tests.test_preemption import LONG

NONE = dict.fromkeys((f"{name}_secs" for name in ("start", "step", "data", "checkpoint", "evaluate", "peer")), 0.0)


def test_time_is_accounted_once():
    """An inner phase's time is not the outer's; the sum is all of it."""
    now = [0.0]
    watchdog = Watchdog(**NONE, clock=lambda: now[0])
    now[0] = 3.0
    with watchdog.during("evaluate"):
        now[0] = 5.0
        with watchdog.during("data"):
            now[0] = 9.0
        now[0] = 10.0
    now[0] = 11.0
    found = {name: secs for name, secs in watchdog.account().items() if secs}
    assert found == {"start": 4.0, "evaluate": 3.0, "data": 4.0}
    assert watchdog.phase == "start"


def run_python(code):
    """(exit code, output, seconds) of Python code with the watch at hand."""
    began = time.monotonic()
    prelude = f"import time, os, signal\nfrom mae_dist.resilience.watchdog import Watchdog\nNONE = {NONE}\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + code], capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - began


def test_deadline_ends_the_process():
    """A phase without progress, and only then: with progress it may take longer."""
    code, output, secs = run_python(
        "with Watchdog(**NONE | {'evaluate_secs': 1}) as watchdog, watchdog.during('evaluate'):\n"
        "    for _ in range(6): time.sleep(.4); watchdog.progress()\n"
        "    print('moved', flush=True)\n"
        "    time.sleep(50)\n"
    )
    assert code == EXIT_STALLED, output
    assert "moved" in output
    assert "phase 'evaluate' after step 0 for 1 s (deadlines.evaluate_secs)" in output
    assert 'File "<string>"' in output, "no stacks"
    assert secs < 30


@pytest.mark.long
def test_a_stopped_process_has_not_stalled():
    """Ctrl-Z and fg: no time has passed for what was stopped."""
    code, output, _ = run_python(
        "import subprocess\n"
        "with Watchdog(**NONE | {'step_secs': 6}) as watchdog, watchdog.during('step'):\n"
        "    pid = os.getpid()\n"
        "    subprocess.Popen(['sh', '-c', f'sleep 1; kill -STOP {pid}; sleep 9; kill -CONT {pid}'])\n"
        "    time.sleep(1.5)\n"
        "    time.sleep(1.5)\n"
        "    print('went on', flush=True)\n"
    )
    assert code == 0, output
    assert "went on" in output


@pytest.mark.long
def test_a_process_that_never_comes(child_env, tmp_path):
    """The others end in time, and say so."""
    args = (*LONG, "--config.deadlines.start_secs=8", f"--workdir={tmp_path / 'run'}")
    where = (f"--coordinator_address=127.0.0.1:{free_port()}", "--num_processes=2", "--process_id=0")
    [process] = start_processes(child_env(), 1, *args, *where)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_PEER_LOST, output
    assert "not all processes came within 8 s" in output


def test_a_failure_is_reported_in_its_phase(capfd):
    """What has failed has left all phases when it is reported; what goes on afterwards is in the next one."""
    watchdog = Watchdog(**NONE, clock=time.monotonic)
    watchdog.step = 57
    with contextlib.suppress(OSError), watchdog.during("step"), watchdog.during("checkpoint"):
        raise OSError
    watchdog._report("lost process 1")
    assert "process 0: phase checkpoint, step 57" in capfd.readouterr().err
    with watchdog.during("data"):
        watchdog._report("lost process 1")
    assert "process 0: phase data, step 57" in capfd.readouterr().err
    watchdog.enter("end")
    watchdog._report("lost process 1")
    assert "process 0: phase end, step 57" in capfd.readouterr().err


def child(name):
    """A started process that does nothing."""
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,), name=name, daemon=True)
    process.start()
    return process


def test_only_workers_of_the_loader_are_killed():
    """Not other children of the program, nor what it reads itself with grain, before or after."""
    earlier = child("grain-process-prefetch of the program")
    workers = Workers(1)
    other, own = child("the program's"), child("grain-process-prefetch")
    workers.look()
    later = child("grain-process-prefetch of the program")
    try:
        kill_workers()
        own.join(timeout=20)
        assert own.exitcode == -signal.SIGKILL
        assert all(process.is_alive() for process in (earlier, other, later))
    finally:
        for process in (earlier, other, own, later):
            process.kill()
            process.join()
