"""Text files of a run's directory, on a disk or in a bucket: written whole, with faults that name the file."""

import contextlib
import os
from collections.abc import Iterator
from typing import Protocol

from clu import asynclib
from etils import epath

from mae_dist.errors import StorageFault


@contextlib.contextmanager
def naming_faults(path: epath.Path) -> Iterator[None]:
    """Turns a failure to read or write into a StorageFault that names the path."""
    try:
        yield
    except (OSError, asynclib.AsyncError) as error:
        cause: BaseException = error
        while isinstance(cause, asynclib.AsyncError) and cause.__cause__ is not None:  # what happened in the thread
            cause = cause.__cause__
        raise StorageFault(
            f"cannot read or write {path}: {cause}. Free some space or make it writable, or choose another place; the "
            "same command then continues from the last checkpoint, if it is a training."
        ) from error


def absolute(path: str) -> epath.Path:
    """A path of the command line or a config, made absolute unless it is a bucket's."""
    return epath.Path(path) if "://" in path else epath.Path(os.path.abspath(os.path.expanduser(path)))


def write_text_atomically(path: epath.Path, text: str) -> None:
    """`write_bytes_atomically` of text in UTF-8."""
    write_bytes_atomically(path, text.encode())


def write_bytes_atomically(path: epath.Path, data: bytes) -> None:
    """Replaces a file so that a reader, or a crash at any moment, finds the old content or the new, never a part."""
    if not is_local(path):
        path.write_bytes(data)  # an object appears whole or not at all
        return
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def appearing(path: epath.Path) -> Iterator[epath.Path]:
    """A hidden place beside a local `path` for a file or directory to be made, which then gets the name.

    If making it fails, nothing is left of it.
    """
    temporary = path.parent / f".{path.stem}.{os.getpid()}.tmp{path.suffix}"
    _remove(temporary)  # of a killed process with the same number
    try:
        with naming_faults(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with naming_faults(path):
            os.rename(temporary, path)
    finally:
        _remove(temporary)


def _remove(path: epath.Path) -> None:
    if path.is_dir():
        path.rmtree()
    else:
        path.unlink(missing_ok=True)


class Lines(Protocol):
    def append(self, line: str) -> None: ...


class FileLines:
    """Appends lines to a file; each is on disk when `append` returns."""

    def __init__(self, path: epath.Path):
        self._path = path

    def append(self, line: str) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


class ObjectLines:
    """Keeps the lines of an object of a bucket, which cannot be appended to, and replaces it each time."""

    def __init__(self, path: epath.Path, text: str):
        self._path, self._text = path, text

    def append(self, line: str) -> None:
        self._text += line
        self._path.write_text(self._text)


def open_lines(path: epath.Path, text: str) -> Lines:
    return FileLines(path) if is_local(path) else ObjectLines(path, text)


def is_local(path: epath.Path) -> bool:
    """Whether a path is on a disk, not in a bucket."""
    return "://" not in os.fspath(path)


def read_text(path: epath.Path) -> str:
    return path.read_bytes().decode("utf-8", "replace") if path.exists() else ""
