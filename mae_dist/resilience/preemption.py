"""Preemption signals: SIGTERM, a closed terminal, or an event of Google's metadata server.

All processes of a run end after the same step. JAX has such a service too; Orbax asks it from background threads with
other steps than the loop's, and it cannot be asked within an evaluation, so the run brings its own.
"""

import contextlib
import ctypes
import os
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Generator
from pathlib import Path
from types import FrameType
from typing import Any

from absl import logging

from mae_dist.errors import ConfigError, say

_KEYS = "mae_dist/preemption"
_ASK_EVERY_SECS = 1.0
_AGREE_SECS = 120.0  # to hear from every process; one that does not answer is lost, and the watchdog ends the run
_METADATA_SERVER = "metadata.google.internal"
_SPOT = "/computeMetadata/v1/instance/preempted"
_MAINTENANCE = "/computeMetadata/v1/instance/maintenance-event"


class Preempted(BaseException):
    """Raised where a preemption signal may interrupt; no `Exception`, so that no library on the way swallows it."""


class PreemptionSignals:
    """The preemption signals to this process, and the step after which all processes of a run end.

    Args:
      simulate_at_step: the last process sends itself a SIGTERM after this step; 0 for never.
    """

    def __init__(self, simulate_at_step: int = 0) -> None:
        self._simulate_at_step = simulate_at_step
        self._handled: list[signal.Signals] = []
        self._c_handler = b""
        self._received = threading.Event()
        self._asked = threading.Lock()  # held while the processes agree: none may pass a poll meanwhile
        self._polls = 0
        self._last_poll: int | None = None  # at which all end
        self._closing = threading.Event()
        self._interrupting = False
        self._client: Any = None
        self._index, self._count = 0, 1

    @contextlib.contextmanager
    def handling(self, metadata_server: str | None) -> Generator[None]:
        """Handles SIGTERM, SIGHUP and the metadata server's events, until it is left.

        Args:
          metadata_server: host or host:port; "" asks none, None finds out whether this machine has one.
        """
        server = _find_metadata_server() if metadata_server is None else metadata_server
        read, write = socket.socketpair()
        write.setblocking(False)
        self._handled = [signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under `nohup`
            self._handled.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._handle) for number in self._handled}
        # The handler in Python waits until a compilation or a collective returns; this byte does not.
        before_fd = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
        self._c_handler = _c_handler()
        listener = threading.Thread(target=self._listen, args=(read,), daemon=True)
        listener.start()
        if server:
            logging.info("Preemption signals: SIGTERM and %s", server)
            threading.Thread(target=self._ask, args=(server,), daemon=True).start()
        try:
            yield
        finally:
            self._closing.set()
            signal.set_wakeup_fd(before_fd)
            for number, handler in before.items():
                signal.signal(number, handler)
            write.close()
            listener.join()

    def join(self, client: Any, index: int, count: int) -> None:
        """Begins to agree with the other processes of the run; `client` is that of JAX's coordination service."""
        self._client, self._index, self._count = client, index, count
        if count > 1:
            threading.Thread(target=self._agree, daemon=True).start()

    def check(self) -> None:
        """Raises `ConfigError` if SIGTERM would not reach this process's handler any more."""
        if not self._handled:
            return
        blocked = signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        if blocked or signal.getsignal(signal.SIGTERM) != self._handle or _c_handler() != self._c_handler:
            raise ConfigError(
                f"SIGTERM {'is blocked' if blocked else 'was given another handler'} after the start: a preemption "
                "signal would be missed and what was not saved be lost. Something that this config imports does it; "
                "let it leave SIGTERM alone"
            )

    def poll(self) -> bool:
        """Returns True if the run ends here. All processes must call it equally often, and get the same answers."""
        with self._asked:
            self._polls += 1
            if self._count == 1:
                return self._received.is_set()
            return self._last_poll is not None and self._polls >= self._last_poll

    @contextlib.contextmanager
    def interrupting(self) -> Generator[None]:
        """Lets a preemption signal end at once what is done inside, by `Preempted`, if this is the only process.

        For what saves nothing and may take long. Of several processes none may leave without the others.
        """
        if self._count > 1:
            yield
            return
        self._interrupting = True
        try:
            if self._received.is_set():
                raise Preempted
            yield
        finally:
            self._interrupting = False

    def after_step(self, step: int) -> None:
        """Sends this process a SIGTERM, if one is simulated after this step."""
        if step == self._simulate_at_step and self._index == self._count - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._note(signal.Signals(number).name)
        if self._interrupting:
            raise Preempted

    def _note(self, source: str) -> None:
        if not self._received.is_set():
            self._received.set()
            say(f"preempted ({source}): saving after this step")

    def _listen(self, read: socket.socket) -> None:
        with read:
            while data := read.recv(64):
                for number in self._handled:
                    if number in data:
                        self._note(number.name)

    def _ask(self, server: str) -> None:
        """Asks the metadata server every second; an event is as a signal, which also interrupts."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine's own network
        while not self._closing.wait(_ASK_EVERY_SECS):
            preempted, event = (_metadata(opener, f"http://{server}{path}") for path in (_SPOT, _MAINTENANCE))
            if (preempted == "TRUE" or event.startswith("TERMINATE")) and not self._closing.is_set():
                self._note(f"the metadata server: preempted={preempted}, maintenance-event={event}")
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def _agree(self) -> None:
        """Waits for a signal to any process; then all report how many polls they passed, and end after the furthest."""
        client, timeout_ms = self._client, round(1000 * _AGREE_SECS)
        while not self._closing.wait(_ASK_EVERY_SECS / 2):
            try:
                if self._received.is_set():
                    client.key_value_set(f"{_KEYS}/received", str(self._index), allow_overwrite=True)
                elif not client.key_value_dir_get(f"{_KEYS}/"):
                    continue
                with self._asked:
                    client.key_value_set(f"{_KEYS}/at/{self._index}", str(self._polls), allow_overwrite=True)
                    keys = [f"{_KEYS}/at/{index}" for index in range(self._count)]
                    self._last_poll = 1 + max(int(client.blocking_key_value_get(key, timeout_ms)) for key in keys)
                self._note("another process received the signal")
                return
            except Exception as error:  # the coordinator is away: the watchdog ends this process
                logging.warning("No agreement with the other processes on a preemption: %s", error)
                time.sleep(_ASK_EVERY_SECS)


def _metadata(opener: urllib.request.OpenerDirector, url: str) -> str:
    """Returns what the metadata server answers, "" if it does not."""
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with opener.open(request, timeout=5) as response:
            return response.read().decode().strip()
    except OSError as error:
        logging.log_first_n(logging.WARNING, "%s does not answer: %s. Asking on.", 1, url, error)
        return ""


def _find_metadata_server() -> str:
    """Returns GCE_METADATA_HOST, or the address of Google's metadata server on a machine of theirs, else ""."""
    made_by = ""
    with contextlib.suppress(OSError):
        made_by = Path("/sys/class/dmi/id/product_name").read_text()
    return os.environ.get("GCE_METADATA_HOST", _METADATA_SERVER if "Google" in made_by else "")


def _c_handler() -> bytes:
    """Returns the address of the C function that handles SIGTERM, which a library can replace unseen by Python."""
    try:
        action = ctypes.create_string_buffer(512)
        ctypes.CDLL(None).sigaction(int(signal.SIGTERM), None, action)
        return action.raw[: ctypes.sizeof(ctypes.c_void_p)]  # the first field of the struct
    except (OSError, AttributeError):
        return b""
