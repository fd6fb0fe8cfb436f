"""One run at a time in a workdir: a lock that dies with its process, whatever kills it.

On a disk the kernel holds it (`<workdir>/.lock`). In a bucket it is a lease, an object that its holder keeps changing:
only one can create it, who finds one watches it, and takes it over when it stays as it is. No clock of another machine
is believed.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Generator
from typing import Any

from absl import logging
from etils import epath

from mae_dist import names
from mae_dist.errors import StorageFault
from mae_dist.storage import is_local, storage_errors

_FILE = ".lock"
_RENEW_SECS = 10.0
_WATCH_SECS = 35.0  # longer than a holder may take to renew


class Held:
    """A workdir that is locked for this run."""

    taken_by = ""  # another run, after this one was silent for too long

    def check(self) -> None:
        """Raises `StorageFault` if another run has taken the workdir over: nothing more may be written there."""
        if self.taken_by:
            raise StorageFault(
                f"this run was silent for so long that another took its workdir over: {self.taken_by}. Let that one "
                "go on"
            )


@contextlib.contextmanager
def workdir_lock(workdir: epath.Path) -> Generator[Held]:
    """Holds the lock of a workdir.

    Raises:
      StorageFault: another run holds it, or it cannot be written.
    """
    path = workdir / _FILE
    with storage_errors(path):
        workdir.mkdir(parents=True, exist_ok=True)
    with _held_file(path) if is_local(path) else _lease(path) as held:
        yield held


def _holder(**more: object) -> str:
    """Returns who holds the lock, for the message to the other."""
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return json.dumps({"host": socket.gethostname(), "process": os.getpid(), "written": since, **more})


def _refuse(path: epath.Path, holder: str) -> StorageFault:
    return StorageFault(
        f"{path.parent} is in use by another run: {holder.strip() or 'unknown'}. End that one first, or choose another "
        "directory"
    )


@contextlib.contextmanager
def _held_file(path: epath.Path) -> Generator[Held]:
    with storage_errors(path):
        file = open(path, "a+b", buffering=0)  # noqa: SIM115 (closed below)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _refuse(path, file.read().decode(errors="replace")) from None
        except OSError as error:  # a file system without locks
            logging.warning("%s cannot be locked (%s): do not start a second run in this workdir", path, error)
        with storage_errors(path):
            file.truncate(0)
            file.write(f"{_holder()}\n".encode())
        yield Held()


class _Object:
    """The lease of one holder. Each write of an object gives it a new generation, and a deletion can name the old."""

    def __init__(self, path: epath.Path):
        import fsspec

        self._bucket: Any = fsspec.filesystem("gcs", version_aware=True)
        self._name = os.fspath(path).removeprefix(names.BUCKET)
        self.holder = uuid.uuid4().hex

    def create(self) -> bool:
        """Creates the object, if there is none: True for only one of all who try at the same time."""
        with contextlib.suppress(FileExistsError):  # or an answer was lost, and the request repeated
            self.write("create")
        return self.holder in self.read()

    def write(self, mode: str) -> None:
        """Writes the object, which changes its generation; the mode "create" fails if there is one."""
        self._bucket.pipe_file(self._name, _holder(holder=self.holder).encode(), mode=mode)

    def generation(self) -> str:
        """Returns the generation of the object as it is now; "" if there is none."""
        try:
            return self._bucket.info(self._name)["generation"]
        except FileNotFoundError:
            return ""

    def read(self) -> str:
        """Returns what the holder wrote; "" if there is none."""
        try:
            return self._bucket.cat_file(self._name).decode()
        except FileNotFoundError:
            return ""

    def delete(self, generation: str) -> None:
        """Deletes the object, if it is still of this generation."""
        with contextlib.suppress(FileNotFoundError):
            self._bucket.rm_file(f"{self._name}#{generation}")


def _take(lease: _Object, path: epath.Path, renew_secs: float, watch_secs: float) -> None:
    """Creates the lease; one that is there already is deleted first, when nobody has renewed it for `watch_secs`."""
    while not lease.create():
        generation, found = lease.generation(), lease.read()
        logging.warning("%s: another run is, or was, here (%s); watching it for %g s", path, found, watch_secs)
        deadline = time.monotonic() + watch_secs
        while time.monotonic() < deadline and (now := lease.generation()):
            if now != generation:
                raise _refuse(path, lease.read() or found)
            time.sleep(min(1.0, renew_secs))
        if generation:
            lease.delete(generation)


@contextlib.contextmanager
def _lease(path: epath.Path, renew_secs: float = _RENEW_SECS, watch_secs: float = _WATCH_SECS) -> Generator[Held]:
    held, ended = Held(), threading.Event()
    with storage_errors(path):
        lease = _Object(path)
        _take(lease, path, renew_secs, watch_secs)

    def renew() -> None:
        while not ended.wait(renew_secs):
            try:
                with storage_errors(path):
                    found = lease.read()
                    if found and lease.holder not in found:
                        held.taken_by = found
                        logging.error("%s was taken over by another run: %s", path, found)
                        return
                    lease.write("overwrite" if found else "create")  # somebody may have deleted it
            except StorageFault as fault:
                logging.warning("%s", fault)

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield held
    finally:
        ended.set()
        thread.join(timeout=renew_secs)
        with contextlib.suppress(StorageFault), storage_errors(path):
            generation = lease.generation()
            if lease.holder in lease.read():
                lease.delete(generation)
