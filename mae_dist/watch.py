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
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from mae_dist.errors import EXIT_PEER_LOST, EXIT_STALLED

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
}


def kill_workers() -> None:
    """Kills the processes that this one started to read data: one that hangs would outlive it."""
    for worker in multiprocessing.active_children():
        worker.kill()


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
        try:
            yield
        finally:
            self._enter(outer)

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
        """For `distributed.initialize`: JAX's own time-outs come after this watch's, which says more."""
        return {
            "join_secs": self._start_secs + 60 if self._start_secs else 86_400,
            "heartbeat_secs": max(100.0, 3 * self._peer_secs),
        }

    def expect_peers(self) -> None:
        """Before the processes join: JAX aborts a process whose coordinator is gone, which becomes an exit code."""
        c_library = ctypes.CDLL(None)
        self._abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: self._on_abort(c_library))
        c_library.signal(int(signal.SIGABRT), self._abort_handler)
        faulthandler.enable()  # prints the stacks, then lets the handler that was there before have the signal

    def join(self, client: Any, address: str, index: int, count: int) -> None:
        """From here on with all processes of the run; `client` is JAX's of its coordination service at `address`."""
        self._client, self._address, self._index, self._count = client, address, index, count
        if count > 1:
            now = self._heard = self._clock()
            self._peers = {i: ("joined", now) for i in range(count) if i != index}
            threading.Thread(target=self._pulse, daemon=True).start()

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
                "phase": self.phase,
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
        mine = f"phase {self.phase}, update {self.step}, since {now - self._progress:.0f} s"
        states = {self._index: mine}
        for index, (said, when) in self._peers.items():
            states[index] = f"{_readable(said)}, heard {now - when:.0f} s ago"
        lines += [f"  process {index}: {states[index]}" for index in sorted(states)]
        print("\n".join(lines), file=sys.stderr, flush=True)

    def _on_abort(self, c_library: Any) -> None:
        """In whatever thread aborts. Only the end of another process gets its own code; anything else is a bug."""
        message = self._never_came() if self.phase == "join" else ""
        deadline = self._clock() + 2 * _SILENT_SECS  # a connection may break before the process is quite gone
        while self._peers and not message and self._clock() < deadline:
            silent = self._silent(_SILENT_SECS)
            if self._index and not _answers(self._address):
                silent = "process 0, which coordinates the others"
            message = f"lost {silent}" if silent else ""
            time.sleep(_PULSE_SECS / 4)
        if message:
            self._report(message)
            os._exit(EXIT_PEER_LOST)
        c_library.signal(int(signal.SIGABRT), None)


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
