"""Datasets decoded once: uint8 images kept in memory, and mapped from a file the next time.

An entry is a directory <cache_dir>/<name>-<key>/ with image.npy, label.npy and meta.json. It is written under another
name and renamed, so that it is whole or absent whichever process dies; its checksums are compared before it is used.
"""

import json
import logging
import os
import re
import shutil
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mae_dist.data.dataset import AUTO_CACHE_BYTES, ArrayDataset, digest, map_array
from mae_dist.data.sources.tfds import TfdsDataset
from mae_dist.errors import ConfigError, DataFault
from mae_dist.storage import local

_CHUNK = 1024  # records decoded at a time
_COLUMNS = ("image", "label")
_RESIZED_VERSION = 2  # of entries whose images were resized: raise it when resizing changes any pixel
_LOG = logging.getLogger(__name__)


def fits_in_memory(dataset: TfdsDataset) -> bool:
    """Whether cache="auto" keeps the dataset decoded: its images have one size and are not too many.

    Images of varying size are never kept: their random crops need all of their pixels. Nor are those whose evaluation
    crop is another than the whole image: kept is only one of the two.
    """
    height, width = dataset.image_size
    size = dataset.num_examples * height * width * dataset.channels
    return dataset.native_size is not None and not dataset.crops_evaluation and size <= AUTO_CACHE_BYTES


def decode_once(dataset: TfdsDataset, *, cache_dir: str, max_bad_share: float) -> ArrayDataset:
    """The same examples in memory, resized to image_size (short side, centre crop), without undecodable ones.

    Args:
      dataset: what to decode.
      cache_dir: where entries live; "" is $XDG_CACHE_HOME/mae_dist or ~/.cache/mae_dist.
      max_bad_share: largest share of records that may be left out because they do not decode.

    Raises:
      ConfigError: the evaluation crop is another than the training one, and only one can be kept.
      DataFault: more records than that do not decode, or as `TfdsDataset.read`.
    """
    if dataset.crops_evaluation:
        raise ConfigError(
            f"data.cache='memory' keeps one image of each example, and of {dataset.title} at {dataset.image_size} "
            "pixels evaluation sees a smaller crop than training; use data.cache='stream'"
        )
    identity = dict(dataset.identity)
    if dataset.native_size != dataset.image_size:
        identity["resized"] = "at load"  # a random crop of what is stored is not one of the original
    entry = _entry_path(dataset, identity, cache_dir)
    found = _open_entry(entry)
    if found is None:
        columns, meta = _decode(dataset, max_bad_share)
        found = _write_entry(entry, columns, meta) or (columns, meta, {})
    columns, meta, paths = found
    _check_share(meta["bad_records"], dataset.num_examples, max_bad_share)
    identity |= {"count": len(columns["label"]), "left_out": meta["bad_positions"]}
    return ArrayDataset(
        columns,
        num_classes=dataset.num_classes,
        class_names=dataset.class_names,
        fingerprint=digest(identity) if meta["bad_positions"] or "resized" in identity else dataset.fingerprint,
        bad_records=tuple(meta["bad_records"]),
        paths=paths,
    )


def _entry_path(dataset: TfdsDataset, identity: dict[str, Any], cache_dir: str) -> Path:
    files = sorted({shard.filename for shard in dataset.shards})
    stats = [(Path(name).name, os.stat(name).st_size, os.stat(name).st_mtime_ns) for name in files]
    version = _RESIZED_VERSION if "resized" in identity else 1
    key = digest(identity | {"files": stats, "entry_version": version})
    title = re.sub(r"[^\w.-]+", "_", dataset.title.replace(" split ", "-")).strip("_")
    return cache_root(cache_dir) / f"{title}-{key[:16]}"


def cache_root(cache_dir: str) -> Path:
    """Returns the directory of what is kept for the next start."""
    name = cache_dir or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "mae_dist")
    return Path(local(name, "data.cache_dir", "the cache is on a disk of each host; name a local path"))


def _open_entry(entry: Path) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Path]] | None:
    """Columns, meta and the files they are mapped from, or None if the entry is absent or damaged."""
    if not entry.exists():
        return None
    paths = {name: entry / f"{name}.npy" for name in _COLUMNS}
    try:
        meta = json.loads((entry / "meta.json").read_text())
        columns = {name: map_array(path) for name, path in paths.items()}
        # Reading all of it once costs a tenth of a second for CIFAR and brings it into the page cache.
        damaged = [name for name in _COLUMNS if zlib.crc32(columns[name].data) != meta["crc32"][name]]
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        _LOG.warning("the decoded copy %s is damaged (%s) and is made again", entry, error)
        return None
    if damaged:
        _LOG.warning("the decoded copy %s is damaged (checksum of %s) and is made again", entry, ", ".join(damaged))
        return None
    return columns, meta, paths


def _decode(dataset: TfdsDataset, max_bad_share: float) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    images = np.empty((dataset.num_examples, *dataset.image_size, dataset.channels), np.uint8)
    labels = np.empty(dataset.num_examples, np.int32)
    bad = np.zeros(dataset.num_examples, bool)

    def decode(start: int) -> None:
        rows = np.arange(start, min(start + _CHUNK, dataset.num_examples))
        columns, bad[rows] = dataset.read(rows, evaluation=False)
        images[rows], labels[rows] = columns["image"], columns["label"]

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases the interpreter lock
        for _ in pool.map(decode, range(0, dataset.num_examples, _CHUNK)):
            pass
    positions = [int(position) for position in np.flatnonzero(bad)]
    names = [dataset.record_name(position) for position in positions]
    _check_share(names, dataset.num_examples, max_bad_share)
    columns = {"image": images, "label": labels}
    if positions:
        _LOG.warning("left out %d records that do not decode: %s", len(names), ", ".join(names))
        columns = {name: column[~bad] for name, column in columns.items()}
    return columns, {"bad_positions": positions, "bad_records": names}


def _check_share(bad_records: list[str], num_examples: int, max_bad_share: float) -> None:
    if len(bad_records) > max_bad_share * num_examples:
        raise DataFault(
            f"{len(bad_records)} of {num_examples} records do not decode, and data.max_bad_share is {max_bad_share:g}: "
            f"{', '.join(bad_records[:10])}; restore the files, or raise data.max_bad_share to leave such records out"
        )


def _write_entry(
    entry: Path, columns: dict[str, np.ndarray], meta: dict[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Path]] | None:
    """Saves and reopens an entry; None, after a warning, where that is not possible."""
    temporary = entry.with_name(f"{entry.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        for name, column in columns.items():
            np.save(temporary / f"{name}.npy", column)
        crc32 = {name: zlib.crc32(np.ascontiguousarray(column).data) for name, column in columns.items()}
        (temporary / "meta.json").write_text(json.dumps(meta | {"crc32": crc32}))
        if entry.exists() and _open_entry(entry) is None:
            # Moved, not emptied in place: another process may have it mapped.
            damaged = entry.with_name(f"{entry.name}.{uuid.uuid4().hex}.damaged")
            entry.rename(damaged)
            shutil.rmtree(damaged, ignore_errors=True)
        if not entry.exists():
            temporary.rename(entry)
    except OSError as error:
        # Also where another process renamed its own entry first; then that one opens below.
        if not entry.exists():
            _LOG.warning("the decoded images stay in memory only, %s cannot be written: %s", entry.parent, error)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _open_entry(entry)
