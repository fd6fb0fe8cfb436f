"""Notices that the machine will be taken away: SIGTERM, a closed terminal, or what Google's metadata server says.

All processes of a run end after the same update. JAX has such a service too; Orbax asks it from background threads with
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
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from absl import logging

from mae_dist.errors import ConfigError, say

_KEYS = "mae_dist/preemption"
_ASK_EVERY_SECS = 1.0
_AGREE_SECS = 120.0  # to hear from every process; one that does not answer is lost, which the watch tells
_METADATA_SERVER = "metadata.google.internal"
_SPOT = "/computeMetadata/v1/instance/preempted"
_MAINTENANCE = "/computeMetadata/v1/instance/maintenance-event"


class Preempted(BaseException):
    """Raised where a notice may interrupt; no `Exception`, so that no library on the way swallows it."""


class Notices:
    """The notices to this process, and what the processes of a run make of them together.

    Args:
      simulate_at_step: the last process tells itself to end after this update; 0 for never.
    """

    def __init__(self, simulate_at_step: int = 0) -> None:
        self._simulate_at_step = simulate_at_step
        self._noticed = threading.Event()
        self._asked = threading.Lock()  # held while the processes agree: none may pass a poll meanwhile
        self._polls = 0
        self._last_poll: int | None = None  # at which all end
        self._closing = threading.Event()
        self._interrupting = False
        self._client: Any = None
        self._index, self._count = 0, 1
        self._handler_in_c: bytes | None = None
        self._metadata_works = True

    @contextlib.contextmanager
    def handling(self, metadata_server: str | None) -> Iterator[None]:
        """Takes SIGTERM and SIGHUP, and asks the metadata server in the background, until it is left.

        SIGHUP, the end of a terminal or a connection, is left alone where it is ignored, as under `nohup`.

        Args:
          metadata_server: host or host:port; "" asks none, None finds out whether this machine has one.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # a library's use, in a thread: signals are not ours there
            return
        server = find_metadata_server() if metadata_server is None else metadata_server
        read, write = socket.socketpair()
        write.setblocking(False)
        taken = [signal.SIGTERM, *([] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP])]
        before = {number: signal.signal(number, self._handle) for number in taken}
        # The handler in Python waits until a compilation or a collective returns; this byte does not.
        before_fd = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
        self._handler_in_c = _handler_in_c()
        listener = threading.Thread(target=self._listen, args=(read,), daemon=True)
        threads = [listener]
        if server:
            logging.info("Preemption notices: SIGTERM and %s", server)
            threads.append(threading.Thread(target=self._ask, args=(server,), daemon=True))
        for thread in threads:
            thread.start()
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
        """From here on with all processes of the run; `client` is JAX's of its coordination service."""
        self._client, self._index, self._count = client, index, count
        if count > 1:
            threading.Thread(target=self._agree, daemon=True).start()

    def check(self) -> None:
        """Raises `ConfigError` if SIGTERM would not reach this process's handler any more."""
        if self._handler_in_c is None:
            return
        blocked = signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        if blocked or signal.getsignal(signal.SIGTERM) != self._handle or _handler_in_c() != self._handler_in_c:
            raise ConfigError(
                f"SIGTERM {'is blocked' if blocked else 'was given another handler'} after the start: a preemption "
                "would not be noticed and what was not saved be lost. Something that this config imports does it; let "
                "it leave SIGTERM alone"
            )

    def poll(self) -> bool:
        """Whether the run ends here. All processes must call it equally often, and get the same answers."""
        with self._asked:
            self._polls += 1
            if self._count == 1:
                return self._noticed.is_set()
            return self._last_poll is not None and self._polls >= self._last_poll

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Lets a notice end at once what is done inside, by `Preempted`, if this is the only process.

        For what saves nothing and may take long. Of several processes none may leave without the others.
        """
        if self._count > 1:
            yield
            return
        self._interrupting = True
        try:
            if self._noticed.is_set():
                raise Preempted
            yield
        finally:
            self._interrupting = False

    def after_update(self, step: int) -> None:
        """Simulates a notice, if it is to come after this update."""
        if step == self._simulate_at_step and self._index == self._count - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._note(signal.Signals(number).name)
        if self._interrupting:
            raise Preempted

    def _note(self, source: str) -> None:
        if not self._noticed.is_set():
            self._noticed.set()
            say(f"preempted ({source}): saving after this update")

    def _listen(self, read: socket.socket) -> None:
        with read:
            while data := read.recv(64):
                for number in {signal.SIGTERM, signal.SIGHUP} & set(data):
                    self._note(signal.Signals(number).name)

    def _ask(self, server: str) -> None:
        """Asks the metadata server every second; a notice is as a signal, which also interrupts."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine's own network
        while not self._closing.wait(_ASK_EVERY_SECS):
            preempted, event = self._metadata(opener, server, _SPOT), self._metadata(opener, server, _MAINTENANCE)
            if (preempted == "TRUE" or event.startswith("TERMINATE")) and not self._closing.is_set():
                self._note(f"the metadata server: preempted={preempted}, maintenance-event={event}")
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def _metadata(self, opener: urllib.request.OpenerDirector, server: str, path: str) -> str:
        request = urllib.request.Request(f"http://{server}{path}", headers={"Metadata-Flavor": "Google"})
        try:
            with opener.open(request, timeout=5) as response:
                value = response.read().decode().strip()
            self._metadata_works = True
            return value
        except OSError as error:
            if self._metadata_works:
                logging.warning("The metadata server %s does not answer: %s. Asking on.", request.full_url, error)
            self._metadata_works = False
            return ""

    def _agree(self) -> None:
        """Tells the others, or hears from them; then all say how far they are, and end one poll after the furthest."""
        while not self._closing.wait(_ASK_EVERY_SECS / 2):
            try:
                if self._noticed.is_set():
                    self._client.key_value_set(f"{_KEYS}/noticed", str(self._index), allow_overwrite=True)
                elif not self._client.key_value_dir_get(f"{_KEYS}/"):
                    continue
                with self._asked:
                    self._client.key_value_set(f"{_KEYS}/at/{self._index}", str(self._polls), allow_overwrite=True)
                    timeout_ms = round(1000 * _AGREE_SECS)
                    at = [
                        int(self._client.blocking_key_value_get(f"{_KEYS}/at/{i}", timeout_ms))
                        for i in range(self._count)
                    ]
                    self._last_poll = max(at) + 1
                self._note("another process was told")
                return
            except Exception as error:  # the coordinator is away: the watch ends this process
                logging.warning("No agreement with the other processes on a preemption: %s", error)
                time.sleep(_ASK_EVERY_SECS)


def find_metadata_server() -> str:
    """The address of Google's metadata server on a machine of theirs, else ""; GCE_METADATA_HOST says otherwise."""
    if "GCE_METADATA_HOST" in os.environ:
        return os.environ["GCE_METADATA_HOST"]
    try:
        made_by = Path("/sys/class/dmi/id/product_name").read_text()
    except OSError:
        return ""
    return _METADATA_SERVER if "Google" in made_by else ""


def _handler_in_c() -> bytes:
    """What the C library calls on SIGTERM; a library can change it behind Python's back."""
    try:
        action = ctypes.create_string_buffer(512)
        ctypes.CDLL(None).sigaction(int(signal.SIGTERM), None, action)
        return action.raw[: ctypes.sizeof(ctypes.c_void_p)]  # the handler is the first field
    except (OSError, AttributeError):
        return b""
