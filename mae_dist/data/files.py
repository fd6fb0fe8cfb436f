"""Helpers for writing many files, each whole or not at all: thread pool, progress, free space, names, locks."""

import contextlib
import fcntl
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from mae_dist.errors import DataFault

_PROGRESS_SECS = 10.0
_LOG = logging.getLogger(__name__)


def run_all(pool: ThreadPoolExecutor, work: Callable[[Any], None], items: list[Any]) -> Iterator[Any]:
    """Yields the items in the order in which their work is done; begins no more after an error."""
    futures = {pool.submit(work, item): item for item in items}
    try:
        for future in as_completed(futures):
            future.result()
            yield futures[future]
    finally:
        for future in futures:
            future.cancel()


class Progress:
    """Logs now and then how far a piece of work is."""

    def __init__(self, what: str, count: int, size: int):
        self._what, self._count, self._size = what, count, size
        self._began = self._logged = time.monotonic()
        self._done = self._bytes = 0

    def add(self, size: int) -> None:
        self._done, self._bytes = self._done + 1, self._bytes + size
        now = time.monotonic()
        if now - self._logged < _PROGRESS_SECS and self._done < self._count:
            return
        self._logged = now
        rate = self._bytes / max(now - self._began, 1e-3)
        left = (self._size - self._bytes) / max(rate, 1.0)
        _LOG.info(
            "%d of %d %s, %.1f of %.1f GB, %.0f MB/s, %.0f s left",
            *(self._done, self._count, self._what, self._bytes / 1e9, self._size / 1e9, rate / 1e6, left),
        )


def check_space(directory: Path, needed: int) -> None:
    """Raises DataFault if a directory's disk has not so many bytes free."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise DataFault(
            f"{directory} has {free / 1e9:.2f} GB free and {needed / 1e9:.2f} GB are to be written; free some space, "
            "or choose a place on a larger disk"
        )


def temporary_beside(path: Path) -> Path:
    """Returns a name that no other process writes to, on this host or another, for a file until it is whole."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def remove_temporaries(directory: Path) -> None:
    """Removes what killed processes of this host left in a directory whose lock the caller holds.

    Other hosts' files stay: some file systems grant a lock to one process of each host, so they may be in use.
    """
    for path in directory.glob(f".*.{socket.gethostname()}.*.tmp"):
        path.unlink()


@contextlib.contextmanager
def locked(path: Path) -> Generator[bool]:
    """Holds an exclusive lock among the processes of one host, and of others, where the file system can.

    Some network file systems have no locks. There the value is False: other processes may do the same work at the same
    time, each under names of its own, and each file that is renamed into place is whole all the same.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            alone = True
        except OSError as error:
            _LOG.warning("%s cannot be locked (%s): other processes may do the same work", path, error)
            alone = False
        yield alone
