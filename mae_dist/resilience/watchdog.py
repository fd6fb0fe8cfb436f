"""What each process of a run is doing, for how long it may, and whether the others still live.

A process that is stuck, or whose peers are gone, cannot end by itself: it waits in a collective or a file system. A
thread ends it, with an exit code of its own, the stacks of all threads and the last that is known of every process.
"""

import contextlib
import ctypes
import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from mae_dist.errors import EXIT_PEER_LOST, EXIT_STALLED, say

_KEYS = "mae_dist/alive"
_PULSE_SECS = 1.0
_SILENT_SECS = 6.0  # without a pulse for so long, a process that also broke a connection is gone
_ENDED = "ended"
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

    The program that we are part of may have children of its own. grain starts the workers in threads of its own, when
    it is first asked for a batch, and hands none of them out: they are the first `count` to appear after this.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._before = set(multiprocessing.active_children()) if count else set()
        self._found: list[Any] = []
        _all_workers.add(self)

    def look(self) -> None:
        """Takes note of those started since; called from time to time until all are there."""
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


class Watch:
    """Phases of this process, their deadlines, and the pulse of all. Deadlines of 0 do not exist.

    Args:
      start_secs: joining the others, opening data, restoring, compiling: each.
      step_secs: an update, or the writing of a profile.
      data_secs: waiting for a batch.
      checkpoint_secs: what a save keeps the loop waiting for.
      evaluate_secs: a batch of an evaluation, or a picture.
      peer_secs: another process without a sign of life.
      clock: seconds.
    """

    def __init__(
        self,
        *,
        start_secs: float,
        step_secs: float,
        data_secs: float,
        checkpoint_secs: float,
        evaluate_secs: float,
        peer_secs: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        limits = {
            "start_secs": start_secs,
            "step_secs": step_secs,
            "data_secs": data_secs,
            "checkpoint_secs": checkpoint_secs,
            "evaluate_secs": evaluate_secs,
        }
        self._limits = {phase: (name, limits[name]) for phase, name in _DEADLINES.items()}
        self._start_secs, self._peer_secs = start_secs, peer_secs
        self._clock = clock
        self.phase, self.step = "start", 0
        self._failed_in = ""  # the phase that an exception has left, until the next phase is entered
        self.secs = dict.fromkeys(_DEADLINES, 0.0)  # spent in each phase
        self._since = self._progress = clock()
        self._client: Any = None
        self._address = ""
        self._index, self._count = 0, 1
        self._peers: dict[int, tuple[str, float]] = {}  # what each said last, and when that was new
        self._heard = clock()  # when the coordinator answered last
        self._closing = threading.Event()
        self._reporting = threading.Lock()
        self._abort_handler: Any = None  # kept: C calls it

    def __enter__(self) -> "Watch":
        threading.Thread(target=self._guard, daemon=True).start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._closing.set()
        if self._client is None or error is not None:
            return  # what ended by a fault falls silent, and the others end too
        with contextlib.suppress(Exception):  # the others may be gone already
            self._client.key_value_set(f"{_KEYS}/{self._index}", _ENDED, allow_overwrite=True)
            deadline = self._clock() + _SILENT_SECS
            while not self._index and self._clock() < deadline:  # the coordinator leaves last
                said = dict(self._client.key_value_dir_get(f"{_KEYS}/"))
                if all(said.get(f"{_KEYS}/{index}") == _ENDED for index in self._peers):
                    time.sleep(_PULSE_SECS / 2)  # until they are really gone
                    break
                time.sleep(_PULSE_SECS / 10)

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What the main thread does inside; the time inside an inner phase is the inner one's alone."""
        outer = self.phase
        self._enter(phase)
        self._failed_in = ""
        try:
            yield
        except Exception:
            self._failed_in = self._failed_in or phase
            raise
        finally:
            self._enter(outer)

    def end(self) -> None:
        """The last update is done: from here on files are closed and results written."""
        self._enter("end")

    def _enter(self, phase: str) -> None:
        self.account()
        self.phase = phase
        self.progress()

    def progress(self) -> None:
        """Within the phase something has moved: its deadline begins anew."""
        self._progress = self._clock()

    def account(self) -> dict[str, float]:
        """Seconds spent in each phase until now."""
        now = self._clock()
        self.secs[self.phase] += now - self._since
        self._since = now
        return self.secs

    def join_options(self) -> dict[str, float]:
        """For `processes.initialize`: JAX's own time-outs come after this watch's, which says more."""
        return {
            "join_secs": self._start_secs + 60 if self._start_secs else 86_400,
            "heartbeat_secs": max(100.0, 3 * self._peer_secs),
        }

    def expect_peers(self, joining: Callable[[], str]) -> None:
        """Before the processes join: JAX aborts a process whose coordinator is gone, which becomes an exit code.

        Args:
          joining: returns host:port of process 0 as soon as it is known, "" in a run of one process.
        """
        c_library = ctypes.CDLL(None)
        handler = lambda number: self._on_abort(self._address or joining(), c_library)  # noqa: E731
        self._abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
        c_library.signal(int(signal.SIGABRT), self._abort_handler)
        faulthandler.enable()  # prints the stacks, then lets the handler that was there before have the signal

    def join(self, client: Any, address: str, index: int, count: int) -> None:
        """From here on with all processes of the run; `client` is JAX's of its coordination service at `address`."""
        self._client, self._address, self._index, self._count = client, address, index, count
        if count > 1:
            now = self._heard = self._clock()
            self._peers = {i: ("joined", now) for i in range(count) if i != index}
            threading.Thread(target=self._pulse, daemon=True).start()
        elif self._abort_handler is not None:
            # Nobody's end can abort this process, and a handler in Python may wait for ever for the interpreter's lock,
            # which the thread that the signal interrupts is about to take.
            faulthandler.disable()
            ctypes.CDLL(None).signal(int(signal.SIGABRT), None)
            faulthandler.enable()

    def end_if_peers_are_gone(self) -> None:
        """Ends this process if another is silent: its death is then what broke a connection here."""
        deadline = self._clock() + self._peer_secs + _SILENT_SECS
        while self._count > 1 and self._clock() < deadline:
            silent = self._silent(_SILENT_SECS)
            if silent:
                self._end(EXIT_PEER_LOST, f"lost {silent}")
            if all(said == _ENDED for said, _ in self._peers.values()):
                return
            time.sleep(_PULSE_SECS / 4)

    def _pulse(self) -> None:
        beat = 0
        while not self._closing.is_set():
            beat += 1
            doing = {
                "beat": beat,
                "phase": self._failed_in or self.phase,
                "step": self.step,
                "secs": round(self._clock() - self._progress),
            }
            try:
                self._client.key_value_set(f"{_KEYS}/{self._index}", json.dumps(doing), allow_overwrite=True)
                said = dict(self._client.key_value_dir_get(f"{_KEYS}/"))
            except Exception:  # of whatever kind: the coordinator did not answer, and its silence is counted
                said = {}
            now = self._clock()
            if said:
                self._heard = now
            for index, (last, _) in list(self._peers.items()):
                value = said.get(f"{_KEYS}/{index}", last)
                if value != last:
                    self._peers[index] = (value, now)
            self._closing.wait(_PULSE_SECS)

    def _silent(self, secs: float) -> str:
        """The processes without a sign of life for so long, "" if there are none."""
        now = self._clock()
        lost = [f"process {i}" for i, (said, when) in self._peers.items() if said != _ENDED and now - when > secs]
        if self._index and now - self._heard > secs and self._peers.get(0, (_ENDED, now))[0] != _ENDED:
            return "process 0, which coordinates the others"
        return ", ".join(lost)

    def _guard(self) -> None:
        last = self._clock()
        while not self._closing.wait(_PULSE_SECS / 4):
            now = self._clock()
            if now - last > _SILENT_SECS:  # this process itself was stopped: no time has passed for it
                self._progress += now - last
                self._heard += now - last
                self._peers = {index: (said, when + now - last) for index, (said, when) in self._peers.items()}
            last = now
            name, limit = self._limits[self.phase]
            if limit and now - self._progress > limit:
                if self.phase == "join":
                    self._end(EXIT_PEER_LOST, self._never_came())
                self._end(
                    EXIT_STALLED,
                    f"stalled: no progress in phase {self.phase!r} after update {self.step} for {limit:g} s "
                    f"(deadlines.{name})",
                )
            silent = self._silent(self._peer_secs) if self._peer_secs else ""
            if silent:
                self._end(EXIT_PEER_LOST, f"lost {silent}: no sign of life for {self._peer_secs:g} s")

    def _never_came(self) -> str:
        return f"not all processes came within {self._start_secs:g} s (deadlines.start_secs)"

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
        lines = [f"error: {message}. The same command continues from the last checkpoint. Last known:"]
        mine = f"phase {self._failed_in or self.phase}, update {self.step}, since {now - self._progress:.0f} s"
        states = {self._index: mine}
        for index, (said, when) in self._peers.items():
            states[index] = f"{_readable(said)}, heard {now - when:.0f} s ago"
        joining = self.phase == "join"  # when JAX has not said yet which process this is
        lines += [f"  {'this process' if joining else f'process {index}'}: {states[index]}" for index in sorted(states)]
        say("\n".join(lines))

    def _on_abort(self, address: str, c_library: Any) -> None:
        """In whatever thread aborts: the end of another process gets its own code; anything else is this one's death.

        Args:
          address: host:port of process 0, "" in a run of one process.
          c_library: to die by.
        """
        deadline = self._clock() + 2 * _SILENT_SECS  # a connection may break before the process is quite gone
        while address and self._clock() < deadline:
            silent = self._silent(_SILENT_SECS)
            if not _answers(address):
                silent = "process 0, which coordinates the others"
            if silent:
                self._report(f"lost {silent}")
                os._exit(EXIT_PEER_LOST)
            time.sleep(_PULSE_SECS / 4)
        c_library.signal(int(signal.SIGABRT), None)
        os.kill(os.getpid(), signal.SIGABRT)  # again: whoever was sent the signal, rather than aborting, would go on


def _readable(said: str) -> str:
    try:
        doing = json.loads(said)
        return f"phase {doing['phase']}, update {doing['step']}, since {doing['secs']} s"
    except (ValueError, KeyError, TypeError):
        return said


def _answers(address: str) -> bool:
    """Whether something listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        return True
    except OSError:
        return False
