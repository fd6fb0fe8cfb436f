"""Finds the image files below directories: a listing of their names, sizes and times, quickly and in a fixed order."""

import dataclasses
import errno
import functools
import glob
import hashlib
import logging
import os
import stat
import uuid
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from mae_dist.data.sources.cache import cache_root
from mae_dist.errors import ConfigError, DataFault
from mae_dist.storage import local

SUFFIXES = (
    *(b".jpg", b".jpeg", b".jpe", b".jfif", b".mpo", b".png", b".webp", b".tif", b".tiff", b".bmp", b".gif"),
    *(b".jp2", b".j2k", b".avif", b".npy", b".pgm", b".ppm", b".pnm"),
)
# Besides hidden ones: what archives, systems and network disks leave beside images, some of it copies of them.
_NOT_ENTERED = (b"__macosx", b"@eadir", b"#recycle", b"@recycle", b"lost+found", b"$recycle.bin")
_THREADS = 16  # they wait for the disk
_KEPT = 8  # listings in the cache
_NAMED = 10  # in a message
_LOG = logging.getLogger(__name__)


class Names(Sequence[bytes]):
    """Many file names in two arrays: a tenth of a list's memory, and quick to send to a worker process."""

    def __init__(self, names: Iterable[bytes]):
        names = list(names)
        self._ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        self._text = b"".join(names)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:  # pyright: ignore[reportIncompatibleMethodOverride]
        index = range(len(self))[index]
        return self._text[self._ends[index - 1] if index else 0 : self._ends[index]]


@dataclasses.dataclass(frozen=True)
class Listing:
    """The image files below `root`, sorted by name.

    Attributes:
      root: absolute path of the directory that names are relative to.
      names: with "/" between directories; any bytes.
      sizes: in bytes. # (N,) int64
      times: of the last change, in nanoseconds. # (N,) int64
      left_out: what else is there, with the reason.
    """

    root: bytes
    names: list[bytes]
    sizes: np.ndarray
    times: np.ndarray
    left_out: "LeftOut"

    @functools.cached_property
    def digest(self) -> str:
        """Returns the hex digest of names and sizes."""
        content = hashlib.sha256(b"\0".join(self.names))
        content.update(self.sizes.tobytes())
        return content.hexdigest()[:32]


class LeftOut:
    """Files and directories that are not used: how many for each reason, and the names of the first."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._first: list[str] = []

    def add(self, name: bytes, reason: str) -> None:
        self.counts[reason] += 1
        if len(self._first) < _NAMED:
            self._first.append(f"{readable(name)} ({reason})")

    def __str__(self) -> str:
        """Returns the counts and the first names, "" if nothing was left out."""
        total = sum(self.counts.values())
        if not total:
            return ""
        counts = ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())
        more = ", …" if total > len(self._first) else ""
        return f"left out {total} files and directories ({counts}): {', '.join(self._first)}{more}"


class _Found(NamedTuple):
    """The contents of one directory, by names relative to the root."""

    files: list[tuple[bytes, int, int]]  # name, size, time
    directories: list[tuple[bytes, tuple[int, int]]]  # name, device and inode
    links: list[tuple[bytes, tuple[int, int]]]  # to directories
    left_out: list[tuple[bytes, str]]


def readable(name: bytes) -> str:
    """Returns a file name as text; bytes that are not UTF-8 are written as numbers."""
    return name.decode(errors="backslashreplace")


def find_images(data_dir: str, field: str = "data.data_dir") -> Listing:
    """Lists the images that `data.data_dir`, or another `field` or flag, names, as `find_files`."""
    return find_files(data_dir, SUFFIXES, "folder", "image", field)


def find_files(
    data_dir: str, suffixes: tuple[bytes, ...], source: str, what: str, field: str = "data.data_dir"
) -> Listing:
    """Lists the files with certain suffixes that `data.data_dir` names.

    Args:
      data_dir: a directory; several, separated by commas; a text file with a path in each line; or a glob. Directories
        are entered to any depth, links to directories once.
      suffixes: of the files, in lower case.
      source: the value of data.source, for messages.
      what: the name of such a file in messages.
      field: the name of `data_dir` in messages.

    Raises:
      ConfigError: it is empty or in a bucket, or a glob that matches nothing.
      DataFault: something is not there or cannot be read, or there is no such file.
    """
    given = _given_paths(data_dir, suffixes, source, what, field)
    directories = [path for path in given if os.path.isdir(path)]
    parents = [path if os.path.isdir(path) else os.path.dirname(path) for path in given]
    root = os.path.commonpath(parents)
    left_out = LeftOut()
    with tqdm(desc=f"listing {data_dir}", unit=" files", disable=None, delay=1) as bar:
        rows = list(_walk(root, directories, suffixes, left_out, bar))
    for path in given:
        if path not in directories:
            found = _stat(path)
            if found is None:
                raise DataFault(f"{readable(path)}, which {field}={data_dir} names, does not exist")
            rows.append((os.path.relpath(path, root), found.st_size, found.st_mtime_ns))
    rows = sorted(set(rows))
    if not rows:
        raise DataFault(
            f"{field}={data_dir} holds no {what} ({', '.join(suffix.decode() for suffix in suffixes)})"
            + (f"; {left_out}" if str(left_out) else "")
        )
    names, sizes, times = zip(*rows, strict=True)
    return Listing(root, list(names), np.array(sizes, np.int64), np.array(times, np.int64), left_out)


def _given_paths(data_dir: str, suffixes: tuple[bytes, ...], source: str, what: str, field: str) -> list[bytes]:
    """Returns the absolute paths of the directories and files that `data_dir` names."""
    if not data_dir:
        raise ConfigError(f"{field}='' with data.source={source!r}; name the directory of the {what}s")
    whole = os.fsencode(os.path.abspath(os.path.expanduser(data_dir)))
    parts = [data_dir] if os.path.exists(whole) else [part.strip() for part in data_dir.split(",") if part.strip()]
    paths: list[bytes] = []
    for part in parts:
        advice = f"images are read from a disk; copy the {what}s there"
        advice += ", or write them with mae_dist.prepare" if source == "folder" else ""
        full = (
            os.path.abspath(os.path.expanduser(part)) if os.path.exists(part) else str(_local_glob(part, field, advice))
        )
        if os.path.isdir(full):
            paths.append(os.fsencode(full))
        elif os.path.isfile(full) and not os.fsencode(full).lower().endswith(suffixes):
            paths += _listed(full, field, what)
        elif os.path.isfile(full):
            paths.append(os.fsencode(full))
        elif glob.has_magic(full):
            matches = sorted(glob.glob(os.fsencode(full), recursive=True))
            if not matches:
                raise ConfigError(f"{field}={part} matches nothing")
            paths += [match for match in matches if os.path.isdir(match) or match.lower().endswith(suffixes)]
        else:
            raise DataFault(f"{field}={part} does not exist; name the directory of the {what}s")
    return paths


def _local_glob(path: str, field: str, advice: str) -> str:
    """Returns an absolute path that may hold the characters of a glob; raises `ConfigError` for a bucket."""
    if "://" in path:
        local(path, field, advice)
    return os.path.abspath(os.path.expanduser(path))


def _listed(path: str, field: str, what: str) -> list[bytes]:
    """Reads the paths in a text file, relative to its directory."""
    with open(path, "rb") as file:
        content = file.read()
    if b"\0" in content:
        raise DataFault(f"{field}={path} is neither a directory, nor one {what}, nor a text file of paths")
    base = os.fsencode(os.path.dirname(path))
    return [os.path.normpath(os.path.join(base, line.strip())) for line in content.splitlines() if line.strip()]


def _stat(path: bytes) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
            return None
        raise DataFault(f"{readable(path)} cannot be read: {error}") from error


def _walk(
    root: bytes, tops: list[bytes], suffixes: tuple[bytes, ...], left_out: LeftOut, bar: "tqdm[Any]"
) -> Iterator[tuple[bytes, int, int]]:
    """Yields (name, size, time) of the files below `tops`; real directories first, then links to others."""
    seen: set[tuple[int, int]] = set()
    waiting = [(os.path.relpath(top, root) if top != root else b"", _identity(os.stat(top))) for top in tops]
    links: list[tuple[bytes, tuple[int, int]]] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        while waiting or links:
            if not waiting:
                links.sort()
                waiting, links = links[:1], links[1:]
            new = []
            for name, identity in waiting:
                if identity not in seen:
                    seen.add(identity)
                    new.append(name)
            waiting = []
            for found in pool.map(functools.partial(_list, root, suffixes), new):
                bar.update(len(found.files))
                yield from found.files
                waiting += found.directories
                links += found.links
                for name, reason in found.left_out:
                    left_out.add(name, reason)


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _list(root: bytes, suffixes: tuple[bytes, ...], directory: bytes) -> _Found:
    """Lists one directory, `directory` relative to `root`."""
    found = _Found([], [], [], [])
    try:
        with os.scandir(os.path.join(root, directory)) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                _sort_in(entry, os.path.join(directory, entry.name), suffixes, found)
    except OSError as error:
        raise DataFault(f"{readable(os.path.join(root, directory))} cannot be listed: {error}") from error
    return found


def _sort_in(entry: "os.DirEntry[bytes]", name: bytes, suffixes: tuple[bytes, ...], found: _Found) -> None:
    lower = entry.name.lower()
    if lower.startswith(b".") or lower in _NOT_ENTERED or lower in (b"thumbs.db", b"desktop.ini"):
        found.left_out.append((name, "hidden or of the system"))
        return
    try:
        status = entry.stat()
    except FileNotFoundError:
        found.left_out.append((name, "broken links"))
        return
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        found.left_out.append((name, "broken links"))
        return
    if stat.S_ISDIR(status.st_mode):
        (found.links if entry.is_symlink() else found.directories).append((name, _identity(status)))
    elif not lower.endswith(suffixes):
        reason = "not images by their names" if suffixes is SUFFIXES else "other files"
        found.left_out.append((name, reason))
    elif not stat.S_ISREG(status.st_mode):
        found.left_out.append((name, "no regular files"))
    else:
        found.files.append((name, status.st_size, status.st_mtime_ns))


def keep(listing: Listing, cache_dir: str) -> None:
    """Keeps a listing in the cache, so that a later start can name what changed; warns where it cannot."""
    directory = cache_root(cache_dir) / "listings"
    path = directory / f"{listing.digest}.npz"
    if path.exists():
        return
    temporary = directory / f".{uuid.uuid4().hex}.npz"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save(listing, temporary)
        temporary.rename(path)
        old = sorted(directory.glob("*.npz"), key=lambda kept: kept.stat().st_mtime)[:-_KEPT]
        for kept in old:
            kept.unlink(missing_ok=True)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        _LOG.warning("the list of files cannot be kept, so that a later change cannot be named: %s", error)


def save(listing: Listing, path: Path) -> None:
    """Writes names, sizes and times to a .npz file."""
    text = np.frombuffer(b"\0".join(listing.names), np.uint8)
    np.savez(path, names=text, sizes=listing.sizes, times=listing.times)


def differences(old_digest: str, listing: Listing, cache_dir: str) -> str:
    """Names what was added, removed and changed since the listing of a digest; "" if that is not in the cache."""
    return changes_since(cache_root(cache_dir) / "listings" / f"{old_digest}.npz", listing)


def changes_since(path: Path, listing: Listing) -> str:
    """Names what was added, removed and changed since a listing was saved to `path`; "" if it is not there."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            old = dict(zip(stored["names"].tobytes().split(b"\0"), stored["sizes"].tolist(), strict=True))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return ""
    new = dict(zip(listing.names, listing.sizes.tolist(), strict=True))
    groups = {
        "added": sorted(new.keys() - old.keys()),
        "gone": sorted(old.keys() - new.keys()),
        "of another size": sorted(name for name in new.keys() & old.keys() if new[name] != old[name]),
    }
    return "; ".join(
        f"{len(names)} {what}: {', '.join(map(readable, names[:5]))}{', …' if len(names) > 5 else ''}"
        for what, names in groups.items()
        if names
    )
