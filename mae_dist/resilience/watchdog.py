"""The watchdog: deadlines for the phases of this process, and the heartbeats of all processes of a run.

A process that is stuck, or whose peers are gone, cannot end by itself: it waits in a collective or a file system. A
thread ends it, with an exit code of its own, the stacks of all threads and the last known state of every process.
"""

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Generator
from typing import Any, NoReturn

from mae_dist.errors import EXIT_PEER_LOST, EXIT_STALLED, say

_KEYS = "mae_dist/alive"
_HEARTBEAT_SECS = 1.0
_SILENT_SECS = 6.0  # without a heartbeat for so long, a process that also broke a connection is gone
_BARRIER_MS = 24 * 3600 * 1000  # the watchdog ends a process that waits in vain
_COORDINATOR = "process 0, which coordinates the others"
# Phases by the deadline that holds for them: seconds without any progress.
_DEADLINES = {
    "start": "start_secs",
    "join": "start_secs",
    "restore": "start_secs",
    "compile": "start_secs",
    "data": "data_secs",
    "step": "step_secs",
    "profile": "step_secs",
    "checkpoint": "checkpoint_secs",
    "evaluate": "evaluate_secs",
    "end": "checkpoint_secs",
}
_WORKER_NAME = "grain-"  # grain's processes are called so; a test sees that ours are found by it


class Workers:
    """The processes that one data loader starts, so that these can be killed and no others.

    grain starts them in threads of its own, when it is first asked for a batch, and hands none of them out: they are
    the first `count` to appear after this.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._before = set(multiprocessing.active_children()) if count else set()
        self._found: list[Any] = []
        _all_workers.add(self)

    def look(self) -> None:
        """Looks for those started since; called from time to time until all are there."""
        if len(self._found) < self._count:
            new = [child for child in multiprocessing.active_children() if child not in self._before]
            self._found = [child for child in new if child.name.startswith(_WORKER_NAME)][: self._count]

    def kill(self) -> None:
        """Kills them: one that hangs would outlive this process."""
        self.look()
        for child in set(multiprocessing.active_children()) & set(self._found):
            child.kill()


_all_workers: weakref.WeakSet[Workers] = weakref.WeakSet()


def kill_workers() -> None:
    """Kills the workers of every data loader."""
    for workers in list(_all_workers):
        workers.kill()


class Watchdog:
    """Phases of this process, their deadlines, and the heartbeats of all. A deadline of 0 is none.

    Args:
      start_secs: joining the others, opening data, restoring, compiling: each.
      step_secs: a step, or the writing of a profile.
      data_secs: waiting for a batch.
      checkpoint_secs: what a save keeps the loop waiting for.
      evaluate_secs: a batch of an evaluation, or a picture.
      peer_secs: another process without a heartbeat.
      clock: seconds.
    """

    def __init__(self, *, peer_secs: float, clock: Callable[[], float] = time.monotonic, **limits: float):
        assert limits.keys() == set(_DEADLINES.values()), sorted(limits)
        self._limits, self._peer_secs, self._clock = limits, peer_secs, clock
        self.phase, self.step = "start", 0
        self._failed_in = ""  # the phase that an exception has left, until the next phase is entered
        self.secs = dict.fromkeys(_DEADLINES, 0.0)  # spent in each phase
        self._since = self._progress = clock()
        self._client: Any = None
        self._index, self._count = 0, 1
        self._peers: dict[int, tuple[str, float]] = {}  # the last heartbeat of each, and when it came
        self._answered = clock()  # when the coordinator answered last
        self._closing = threading.Event()
        self._reporting = threading.Lock()
        self._abort_handler: Any = None  # kept: C calls it

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._guard, daemon=True).start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._count > 1 and error is None:  # what ended by a fault falls silent, and the others end too
            with contextlib.suppress(Exception):  # the others may be gone already
                self._client.wait_at_barrier(f"{_KEYS}/end", _BARRIER_MS)
                if self._index == 0:
                    time.sleep(_HEARTBEAT_SECS / 2)  # the coordinator leaves last
        self._closing.set()

    @contextlib.contextmanager
    def during(self, phase: str) -> Generator[None]:
        """Holds the main thread in a phase; the time inside an inner phase is the inner one's alone."""
        outer = self.phase
        self.enter(phase)
        self._failed_in = ""
        try:
            yield
        except Exception:
            self._failed_in = self._failed_in or phase
            raise
        finally:
            self.enter(outer)

    def enter(self, phase: str) -> None:
        """Enters a phase for good."""
        self.account()
        self.phase = phase
        self.progress()

    def progress(self) -> None:
        """Begins the phase's deadline anew: something has moved."""
        self._progress = self._clock()

    def account(self) -> dict[str, float]:
        """Returns the seconds spent in each phase until now."""
        now = self._clock()
        self.secs[self.phase] += now - self._since
        self._since = now
        return self.secs

    def join_options(self) -> dict[str, float]:
        """Returns options of `processes.initialize`: JAX's own time-outs come later than ours, which say more."""
        start_secs = self._limits["start_secs"]
        return {
            "join_secs": start_secs + 60 if start_secs else 86_400,
            "heartbeat_secs": max(100.0, 3 * self._peer_secs),
        }

    def expect_peers(self, address: Callable[[], str]) -> None:
        """Gives an exit code to the abort by which JAX ends a process whose coordinator is gone; called before joining.

        Args:
          address: returns host:port of process 0 as soon as it is known, "" in a run of one process.
        """
        self._abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: self._on_abort(address()))
        ctypes.CDLL(None).signal(int(signal.SIGABRT), self._abort_handler)
        faulthandler.enable()  # prints the stacks, then lets the handler that was there before have the signal

    def join(self, client: Any, index: int, count: int) -> None:
        """Begins the heartbeats of a run of several processes; `client` is that of JAX's coordination service."""
        self._client, self._index, self._count = client, index, count
        if count > 1:
            now = self._answered = self._clock()
            self._peers = {i: ("0 joined", now) for i in range(count) if i != index}
            threading.Thread(target=self._beat, daemon=True).start()
        elif self._abort_handler is not None:
            # No other process can abort this one. A handler in Python could wait for ever for the interpreter's lock,
            # which the thread that the signal interrupts may be about to take.
            faulthandler.disable()
            ctypes.CDLL(None).signal(int(signal.SIGABRT), None)
            faulthandler.enable()

    def end_if_peers_are_gone(self) -> None:
        """Ends this process if another is silent: its death is then what broke a connection here."""
        deadline = self._clock() + self._peer_secs + _SILENT_SECS
        while self._count > 1 and self._clock() < deadline:
            if silent := self._silent(_SILENT_SECS):
                self._end(EXIT_PEER_LOST, f"lost {silent}")
            time.sleep(_HEARTBEAT_SECS / 4)

    def _state(self) -> str:
        secs = round(self._clock() - self._progress)
        return f"phase {self._failed_in or self.phase}, step {self.step}, since {secs} s"

    def _beat(self) -> None:
        beat = 0
        while not self._closing.is_set():
            beat += 1
            with contextlib.suppress(Exception):  # the coordinator did not answer, and its silence is counted
                text = f"{beat} {self._state()}"
                self._client.key_value_set(f"{_KEYS}/{self._index}", text, allow_overwrite=True)
                found = dict(self._client.key_value_dir_get(f"{_KEYS}/"))
                now = self._answered = self._clock()
                for index, (last, _) in list(self._peers.items()):
                    text = found.get(f"{_KEYS}/{index}", last)
                    if text != last:
                        self._peers[index] = (text, now)
            self._closing.wait(_HEARTBEAT_SECS)

    def _silent(self, secs: float) -> str:
        """Returns the names of the processes without a heartbeat for so long, "" if there are none."""
        now = self._clock()
        if self._index and now - self._answered > secs:
            return _COORDINATOR
        return ", ".join(f"process {index}" for index, (_, when) in self._peers.items() if now - when > secs)

    def _guard(self) -> None:
        last = self._clock()
        while not self._closing.wait(_HEARTBEAT_SECS / 4):
            now = self._clock()
            if now - last > _SILENT_SECS:  # this process itself was stopped: no time has passed for it
                self._progress += now - last
                self._answered += now - last
                self._peers = {index: (text, when + now - last) for index, (text, when) in self._peers.items()}
            last = now
            name = _DEADLINES[self.phase]
            limit = self._limits[name]
            if limit and now - self._progress > limit:
                if self.phase == "join":
                    self._end(EXIT_PEER_LOST, f"not all processes came within {limit:g} s (deadlines.{name})")
                where = f"phase {self.phase!r} after step {self.step}"
                self._end(EXIT_STALLED, f"stalled: no progress in {where} for {limit:g} s (deadlines.{name})")
            if self._peer_secs and (silent := self._silent(self._peer_secs)):
                self._end(EXIT_PEER_LOST, f"lost {silent}: no heartbeat for {self._peer_secs:g} s")

    def _end(self, code: int, message: str) -> NoReturn:
        if not self._reporting.acquire(blocking=False):
            time.sleep(60)  # another thread is ending the process
        self._report(message)
        faulthandler.dump_traceback(all_threads=True)
        kill_workers()
        sys.stderr.flush()
        os._exit(code)

    def _report(self, message: str) -> None:
        now = self._clock()
        states = {self._index: self._state()}
        for index, (text, when) in self._peers.items():
            states[index] = f"{text.partition(' ')[2]}, heard {now - when:.0f} s ago"
        lines = [f"error: {message}. The same command continues from the last checkpoint. Last known:"]
        joining = self.phase == "join"  # when JAX has not said yet which process this is
        lines += [f"  {'this process' if joining else f'process {index}'}: {states[index]}" for index in sorted(states)]
        say("\n".join(lines))

    def _on_abort(self, address: str) -> None:
        """Runs in whatever thread aborts: ends by a code if another process has ended, else by the abort.

        Args:
          address: host:port of process 0, "" in a run of one process.
        """
        deadline = self._clock() + 2 * _SILENT_SECS  # a connection may break before the process is quite gone
        while address and self._clock() < deadline:
            silent = self._silent(_SILENT_SECS) if _answers(address) else _COORDINATOR
            if silent:
                self._report(f"lost {silent}")
                os._exit(EXIT_PEER_LOST)
            time.sleep(_HEARTBEAT_SECS / 4)
        ctypes.CDLL(None).signal(int(signal.SIGABRT), None)
        os.kill(os.getpid(), signal.SIGABRT)  # again: whoever was sent the signal, rather than aborting, would go on


def _answers(address: str) -> bool:
    """True if something listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        return True
    except OSError:
        return False
