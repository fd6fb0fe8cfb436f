"""Record files copied once to a disk of this host, from a bucket, where they cannot be read at random, or a slow mount.

A file is copied under another name, compared with what it should be, synced and renamed: whole or absent. The processes
of a host wait for the one that copies; of several hosts each copies all that its splits need.
"""

import base64
import functools
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from etils import epath

from mae_dist import storage
from mae_dist.data.files import Progress, check_space, locked, remove_temporaries, run_all, temporary_beside
from mae_dist.errors import DataFault

_THREADS = 8
_LOCK = ".staging.lock"
_CHUNK = 8 * 2**20
_LOG = logging.getLogger(__name__)


class Staging:
    """A TFDS data directory, in a bucket or mounted, and its copy as far as it is needed.

    Attributes:
      data_dir: the copy's.
    """

    def __init__(self, data_dir: str, cache_root: Path):
        self._source = storage.absolute(data_dir)
        self.data_dir = cache_root / "staged" / os.fspath(self._source).replace("://", "/").strip("/")

    def copy_info(self, name: str) -> None:
        """Copies what describes a data set, again if it changed.

        Raises:
          DataFault: it is not there.
          StorageFault: the bucket cannot be read.
        """
        import tensorflow_datasets as tfds

        with storage.storage_errors(self._source):
            try:
                builder = tfds.builder(name, data_dir=os.fspath(self._source), try_gcs=False)
                directory = epath.Path(builder.data_path)
                found = sorted(path for path in directory.iterdir() if path.suffix in (".json", ".txt"))
            except (tfds.core.DatasetNotFoundError, FileNotFoundError, NotADirectoryError):
                directory, found = self._source, []
            if not any(path.name == "dataset_info.json" for path in found):
                raise DataFault(
                    f"{self._source} holds no prepared {name}: prepare it on a disk (python -m mae_dist.prepare), then "
                    f"copy {name} from its --data_dir there"
                )
            contents = {self._target(path): path.read_bytes() for path in found}
        copy = self._target(directory)
        with storage.storage_errors(epath.Path(copy)), locked(copy / _LOCK):
            changed = [path for path in contents if not path.exists() or path.read_bytes() != contents[path]]
            if changed:  # then its records are others as well
                for old in copy.iterdir():
                    if old.name != _LOCK:
                        old.unlink()
            for path in sorted(contents, key=lambda path: path.name == "dataset_info.json"):
                storage.write_bytes_atomically(epath.Path(path), contents[path])

    def copy_records(self, files: list[Path]) -> None:
        """Copies the record files of which `files` are to be the copies, as far as they are not there.

        Raises:
          DataFault: too little space, or a copy that is not what it should be.
          StorageFault: what is read or written fails.
        """
        copy = files[0].parent
        with storage.storage_errors(epath.Path(copy)), locked(copy / _LOCK) as alone:
            if alone:
                remove_temporaries(copy)
            missing = [path for path in files if not path.exists()]
            if not missing:
                return
            with ThreadPoolExecutor(_THREADS) as pool:
                sizes = dict(zip(missing, pool.map(self._size, missing), strict=True))
                check_space(copy, sum(sizes.values()))
                _LOG.info("copying %d files from %s to %s", len(missing), self._source, copy)
                progress = Progress("files", len(missing), sum(sizes.values()))
                for path in run_all(pool, self._copy, missing):
                    progress.add(sizes[path])

    def _target(self, source: epath.Path) -> Path:
        return self.data_dir / os.path.relpath(os.fspath(source), os.fspath(self._source))

    def _origin(self, target: Path) -> epath.Path:
        return self._source / os.fspath(target.relative_to(self.data_dir))

    def _size(self, target: Path) -> int:
        origin = self._origin(target)
        with storage.storage_errors(origin):
            try:
                return int(origin.stat().length)
            except FileNotFoundError as error:
                raise DataFault(f"{origin} is missing; restore it") from error

    def _copy(self, target: Path) -> None:
        origin = self._origin(target)
        temporary = temporary_beside(target)
        size, kind, checksum = (_fetch_file if storage.is_local(origin) else _fetch_object)(origin, temporary)
        with open(temporary, "rb") as copy:
            os.fsync(copy.fileno())
            made = _checksum(copy, kind)
        if (temporary.stat().st_size, made) != (size, checksum):
            temporary.unlink()
            raise DataFault(f"the copy of {origin} is not what is there (size or {kind}); start again to copy it anew")
        temporary.rename(target)


def _fetch_file(origin: epath.Path, target: Path) -> tuple[int, str, bytes]:
    """Copies a file. Returns the size and checksum of what was read."""
    made, size = hashlib.md5(usedforsecurity=False), 0
    with open(target, "wb") as copy:
        for chunk in _chunks(origin, origin.open):
            made.update(chunk)
            size += copy.write(chunk)
    return size, "md5", made.digest()


def _fetch_object(origin: epath.Path, target: Path) -> tuple[int, str, bytes]:
    """Copies an object of a bucket. Returns the size and checksum that the bucket knows."""
    import fsspec

    bucket: Any = fsspec.filesystem("gcs", finalize_on_close=True)  # the one that epath uses
    name = os.fspath(origin).removeprefix("gs://")
    with storage.storage_errors(origin):
        known = bucket.info(name)
    # Not by the bucket's own get_file: of its faults nobody could tell on which side they are.
    with open(target, "wb") as copy:
        for chunk in _chunks(origin, functools.partial(bucket.open, name, cache_type="none")):
            copy.write(chunk)
    kind = "md5" if "md5Hash" in known else "crc32c"  # an object composed of several has no MD5
    return int(known["size"]), kind, base64.b64decode(known["md5Hash" if kind == "md5" else "crc32c"])


def _chunks(origin: epath.Path, open_source: Callable[[str], Any]) -> Iterator[bytes]:
    with storage.storage_errors(origin), open_source("rb") as source:
        while chunk := source.read(_CHUNK):
            yield chunk


def _checksum(file: BinaryIO, kind: str) -> bytes:
    if kind == "crc32c":
        import google_crc32c  # comes with what reaches buckets

        made: Any = google_crc32c.Checksum()
    else:
        made = hashlib.md5(usedforsecurity=False)
    while chunk := file.read(_CHUNK):
        made.update(chunk)
    return made.digest()
