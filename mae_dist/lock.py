"""One run at a time in a workdir: a lock that dies with its process, whatever kills it.

On a disk the kernel holds it (`<workdir>/.lock`). In a bucket it is a lease, an object that its holder keeps changing:
who finds one watches it, and takes it over when it stays as it is. No clock of another machine is believed.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator

from absl import logging
from etils import epath

from mae_dist.errors import StorageFault
from mae_dist.storage import is_local, naming_faults

_FILE = ".lock"
_RENEW_SECS = 10.0
_WATCH_SECS = 35.0  # longer than a holder may take to renew


@contextlib.contextmanager
def sole_user(workdir: epath.Path) -> Iterator[None]:
    """Holds the workdir's lock.

    Raises:
      StorageFault: another run holds it, or it cannot be written.
    """
    path = workdir / _FILE
    with naming_faults(path):
        workdir.mkdir(parents=True, exist_ok=True)
    with _held_file(path) if is_local(path) else _lease(path):
        yield


def _holder(beat: int = 0) -> str:
    """Who holds it, for the message to the other."""
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return json.dumps({"host": socket.gethostname(), "process": os.getpid(), "written": since, "beat": beat})


def _refuse(path: epath.Path, holder: str) -> StorageFault:
    return StorageFault(
        f"{path.parent} is in use by another run: {holder.strip() or 'unknown'}. End that one first, or choose another "
        "directory"
    )


@contextlib.contextmanager
def _held_file(path: epath.Path) -> Iterator[None]:
    with naming_faults(path), contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "a+", encoding="utf-8"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _refuse(path, file.read()) from None
        except OSError as error:  # a file system without locks
            logging.warning("%s cannot be locked (%s): do not start a second run in this workdir", path, error)
        file.truncate(0)
        file.write(_holder() + "\n")
        file.flush()
        keep = stack.pop_all()
    with keep:
        yield


@contextlib.contextmanager
def _lease(path: epath.Path, renew_secs: float = _RENEW_SECS, watch_secs: float = _WATCH_SECS) -> Iterator[None]:
    with naming_faults(path):
        if path.exists():
            found = path.read_text()
            logging.warning("%s: another run is, or was, here (%s); watching it for %g s", path, found, watch_secs)
            deadline = time.monotonic() + watch_secs
            while time.monotonic() < deadline and path.exists():
                if path.read_text() != found:
                    raise _refuse(path, found)
                time.sleep(min(1.0, renew_secs))
        path.write_text(_holder())
    ended = threading.Event()

    def renew() -> None:
        beat = 0
        while not ended.wait(renew_secs):
            beat += 1
            try:
                with naming_faults(path):
                    path.write_text(_holder(beat))
            except StorageFault as fault:
                logging.warning("%s", fault)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=renew_secs)
        with contextlib.suppress(StorageFault), naming_faults(path):
            path.unlink(missing_ok=True)
