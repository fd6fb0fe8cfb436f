"""Copies the record files that a split needs to a disk of this host once, from a bucket or a slow mount.

array_record reads a bucket at random, too, but by a request for each record of each epoch. A file is copied under
another name, compared with what it should be, synced and renamed: whole or absent. The processes of a host wait for
the one that copies; of several hosts each copies all that its splits need.
"""

import base64
import functools
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
            contents = {path.name: path.read_bytes() for path in found}
        copy = self.data_dir / os.path.relpath(os.fspath(directory), os.fspath(self._source))
        with storage.storage_errors(epath.Path(copy)), locked(copy / _LOCK):
            paths = {copy / file: content for file, content in contents.items()}
            if any(not path.exists() or path.read_bytes() != content for path, content in paths.items()):
                for old in copy.iterdir():  # its records are others as well
                    if old.name != _LOCK:
                        old.unlink()
                for path in sorted(paths, key=lambda path: path.name == "dataset_info.json"):  # that one last
                    storage.write_bytes_atomically(epath.Path(path), paths[path])

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
        origin, temporary = self._origin(target), temporary_beside(target)
        with storage.storage_errors(origin):
            source, new_hash, known = _open(origin)
        read, made = new_hash(), new_hash()
        with open(temporary, "wb") as copy:
            for chunk in _chunks(origin, source):
                read.update(chunk)
                copy.write(chunk)
            copy.flush()
            os.fsync(copy.fileno())
        with open(temporary, "rb") as copy:
            for chunk in iter(functools.partial(copy.read, _CHUNK), b""):
                made.update(chunk)
        if made.digest() != (known or read.digest()):
            temporary.unlink()
            raise DataFault(
                f"the copy of {origin} is not what is there (its checksum differs); start again to copy it anew"
            )
        temporary.rename(target)


def _open(origin: epath.Path) -> tuple[Any, Callable[[], Any], bytes]:
    """Opens a file or an object of a bucket; returns it with its kind of checksum, and its own, b"" if not known."""
    md5 = functools.partial(hashlib.md5, usedforsecurity=False)
    if storage.is_local(origin):
        return open(origin, "rb"), md5, b""
    import fsspec

    bucket: Any = fsspec.filesystem("gcs", finalize_on_close=True)  # the one that epath uses
    name = os.fspath(origin).removeprefix("gs://")
    known = bucket.info(name)
    # Not by the bucket's own get_file: it cannot check objects composed of several, which have no MD5, and does not
    # tell on which side a fault is.
    source = bucket.open(name, cache_type="none")
    if "md5Hash" in known:
        return source, md5, base64.b64decode(known["md5Hash"])
    import google_crc32c  # comes with what reaches buckets

    return source, google_crc32c.Checksum, base64.b64decode(known["crc32c"])


def _chunks(path: epath.Path, file: Any) -> Iterator[bytes]:
    with storage.storage_errors(path), file:
        while chunk := file.read(_CHUNK):
            yield chunk
