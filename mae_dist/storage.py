"""Files of a run's directory, on a disk or in a bucket: atomic writes, and errors that name the file."""

import contextlib
import datetime
import functools
import importlib.util
import json
import logging
import os
import posixpath
from collections.abc import Callable, Generator, Mapping
from typing import Any, Generic, TypeVar

from clu import asynclib
from etils import epath

from mae_dist import names, os_errors
from mae_dist.errors import ConfigError, StorageFault

# Read by epath when it first opens anything: it would go to buckets through TensorFlow wherever that is installed.
os.environ.setdefault("EPATH_USE_TF", "0")

# Packages that reach buckets with exceptions of their own, not all of them an OSError.
_CLIENTS = ("gcsfs", "google", "aiohttp")
_Record = TypeVar("_Record")


@contextlib.contextmanager
def storage_errors(path: epath.Path) -> Generator[None]:
    """Turns an exception while reading or writing into a StorageFault that names the path."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while isinstance(cause, asynclib.AsyncError) and cause.__cause__ is not None:  # raised in its thread
            cause = cause.__cause__
        of_client = type(cause).__module__.partition(".")[0] in _CLIENTS
        if not (isinstance(error, OSError | asynclib.AsyncError) or of_client):
            raise
        cure = (
            os_errors.cure(error) or "See whether the place can be read and written, or choose another"
            if is_local(path)
            else "Check the network, the credentials (gcloud auth application-default login) and their permissions"
        )
        raise StorageFault(
            f"cannot read or write {path}: {str(cause).rstrip('.')}. {cure}; the same command then continues from the "
            "last checkpoint, if it is a training."
        ) from error


def absolute_name(path: str | os.PathLike[str]) -> str:
    """Returns a path of the command line or a config as an absolute one, `~` expanded, unless it is a bucket's.

    Looks at the name alone, not at what is there.

    Raises:
      ConfigError: a library would read the name as another; the message names the character.
    """
    given = os.fsdecode(path)
    if fault := names.scheme_fault(given):
        raise ConfigError(fault)
    if given.startswith(names.BUCKET):
        full = names.BUCKET + posixpath.normpath(given.removeprefix(names.BUCKET))
    else:
        try:
            full = os.path.abspath(os.path.expanduser(given))
        except FileNotFoundError as error:
            raise ConfigError(f"{given!r} is relative to a directory that was deleted; cd to another") from error
    if fault := names.path_fault(full):
        raise ConfigError(fault)
    return full


def absolute(path: str | os.PathLike[str]) -> epath.Path:
    """Returns `absolute_name(path)` as a path; a bucket must be within reach.

    Raises:
      ConfigError: as `absolute_name`; or nothing is installed that reads buckets.
      StorageFault: there is no such bucket, or it may not be read.
    """
    full = absolute_name(path)
    if full.startswith(names.BUCKET):
        _reach(full.removeprefix(names.BUCKET).partition("/")[0])
    return epath.Path(full)


def local(path: str, flag: str, instead: str) -> epath.Path:
    """Returns `absolute(path)`; raises a `ConfigError` with the flag or field and the cure if it is in a bucket."""
    full = absolute_name(path)
    if full.startswith(names.BUCKET):
        raise ConfigError(f"{flag}={path}: {instead}")
    return epath.Path(full)


def check_checkpoints(path: str | epath.Path, *, saving: bool) -> None:
    """Raises `ConfigError` if checkpoints below an absolute path could not be read, or after `saving` not read back."""
    if fault := names.checkpoint_fault(os.fspath(path), saving=saving):
        raise ConfigError(fault)


@functools.cache
def _reach(bucket: str) -> None:
    """Asks once for a bucket: a mistyped name would look like an empty directory until the first checkpoint."""
    if importlib.util.find_spec("gcsfs") is None:
        raise ConfigError(f"gs://{bucket}: buckets need the extra `gcs`: pip install -e .[gcs]")
    import fsspec.config

    # gcsfs caches listings for ever; tensorstore and other processes write to the same directories.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    # Failures are raised as well, and reported without a traceback.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    logging.getLogger("fsspec").setLevel(logging.WARNING)  # reports every file opened
    with storage_errors(epath.Path(f"gs://{bucket}")):
        try:
            fsspec.filesystem("gcs", finalize_on_close=True).ls(bucket, max_results=1)  # the one that epath uses
        except FileNotFoundError as error:
            raise StorageFault(
                f"gs://{bucket}: there is no such bucket; correct its name, or make it: "
                f"gcloud storage buckets create gs://{bucket}"
            ) from error


def children_of(directory: epath.Path) -> list[epath.Path]:
    """Returns what is in a directory, sorted, [] if there is none; epath alone would leave out names that end in ~."""
    if not directory.is_dir():
        return []
    if is_local(directory):
        return [directory / name for name in sorted(os.listdir(directory))]
    return sorted(directory.iterdir())


def write_text_atomically(path: epath.Path, text: str) -> None:
    """Writes text in UTF-8 by `write_bytes_atomically`; bytes of names that are not text are written as numbers."""
    write_bytes_atomically(path, text.encode(errors="backslashreplace"))


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


def set_aside(path: epath.Path) -> None:
    """Renames a file, if it exists, to a name with the time in it, so that another can be written in its place."""
    if path.exists():
        now = datetime.datetime.now(tz=datetime.UTC).strftime("%Y%m%dT%H%M%S")
        kept = path.parent / f"{path.stem}_{now}{path.suffix}"
        path.rename(kept)
        logging.getLogger(__name__).warning("%s is kept as %s", path, kept.name)


@contextlib.contextmanager
def appearing(path: epath.Path) -> Generator[epath.Path]:
    """Holds a hidden path beside a local `path`, for a file or directory that gets the name when it is complete.

    Nothing is left of it if an exception is raised.
    """
    temporary = path.parent / f".{path.stem}.{os.getpid()}.tmp{path.suffix}"
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)  # of a killed process with the same number
    try:
        yield temporary
        with storage_errors(path):
            os.rename(temporary, path)
    finally:
        _remove(temporary)


def _remove(path: epath.Path) -> None:
    if path.is_dir():
        path.rmtree()
    else:
        path.unlink(missing_ok=True)


class JsonLines(Generic[_Record]):
    """A JSON Lines file to append to, which holds whole records only, however its last writer ended.

    Opening it makes its directory, and drops records that are not to be kept and a last line that was cut short.

    Args:
      path, parse, what: as for `read_json_lines`, whose errors are raised.
      keep: True for a record that stays.

    Attributes:
      last: the last record that was there and stays, None without one.
    """

    def __init__(
        self,
        path: epath.Path,
        parse: Callable[[Any], _Record],
        what: str,
        keep: Callable[[_Record], bool] = lambda record: True,
    ):
        self._path = path
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            text = read_text(path)
            kept = [(line, record) for line, record in _parse_lines(text, path, parse, what) if keep(record)]
            self._text = "".join(line + "\n" for line, _ in kept)
            if self._text != text:
                write_text_atomically(path, self._text)
        self.last = kept[-1][1] if kept else None

    def append(self, record: Mapping[str, Any]) -> None:
        """Appends a record, which is stored when this returns; ValueError if JSON has no such number."""
        line = json.dumps(record, allow_nan=False) + "\n"
        with storage_errors(self._path):
            if not is_local(self._path):  # an object of a bucket is replaced each time
                self._text += line
                self._path.write_text(self._text)
                return
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())


def is_local(path: epath.Path) -> bool:
    """True if a path is on a disk, not in a bucket."""
    return "://" not in os.fspath(path)


def read_text(path: epath.Path) -> str:
    """Returns the text of a file, "" if it does not exist; bytes that are not UTF-8 are replaced."""
    return path.read_bytes().decode("utf-8", "replace") if path.exists() else ""


def read_json_lines(path: epath.Path, parse: Callable[[Any], _Record], what: str) -> list[_Record]:
    """Returns the records of a JSON Lines file, [] if there is none; a last line that was cut short is left out.

    Args:
      path: the file.
      parse: JSON value -> record; raises ValueError, KeyError, TypeError or AttributeError if it is not one.
      what: the name of a record in messages.

    Raises:
      StorageFault: the file cannot be read, or a line before the last is not a record.
    """
    with storage_errors(path):
        return [record for _, record in _parse_lines(read_text(path), path, parse, what)]


def _parse_lines(text: str, path: epath.Path, parse: Callable[[Any], _Record], what: str) -> list[tuple[str, _Record]]:
    """Returns the lines of such a file, each with its record."""
    lines = text.removesuffix("\n").split("\n") if text else []
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            parsed.append((line, parse(json.loads(line))))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number < len(lines):
                raise StorageFault(
                    f"{path}, line {number} is no {what}: {line[:80]!r}. Something else wrote to this "
                    "file, or the disk corrupted it: delete that line and start again."
                ) from error
    return parsed
