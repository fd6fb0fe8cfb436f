"""Datasets decoded once: images kept in memory, and mapped from a file the next time.

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

from mae_dist.data.dataset import ArrayDataset, Dataset, digest, map_array
from mae_dist.data.sources.encoded import EncodedDataset
from mae_dist.errors import ConfigError, DataFault
from mae_dist.storage import local

# Images of one size up to this many decoded bytes are kept in memory by cache="auto": CIFAR is 154 MB.
_AUTO_BYTES = 2 * 1024**3
_CHUNK = 1024  # records decoded at a time
_COLUMNS = ("image", "label")
_RESIZED_VERSION = 2  # of entries whose images were resized: raise it when resizing changes any pixel
_LOG = logging.getLogger(__name__)

_Columns = dict[str, np.ndarray]
_Meta = dict[str, Any]


def cached(dataset: EncodedDataset, *, cache: str, cache_dir: str, max_bad_share: float) -> Dataset:
    """Returns the dataset as `data.cache` asks: kept decoded in memory, or as it is.

    Args:
      dataset: what to decode.
      cache: "memory" decodes once and keeps the images, for images of varying size the short side resized and the
        centre cropped, so that random crops see no more than that. "stream" decodes on every read. "auto" is "memory"
        for images of one size, up to 2 GiB decoded, of which evaluation sees no smaller crop; else "stream".
      cache_dir: where decoded images are kept for the next start; "" is $XDG_CACHE_HOME/mae_dist or ~/.cache/mae_dist.
      max_bad_share: largest share of records that may be left out because they do not decode.

    Raises:
      ConfigError: "memory", and the evaluation crop is another than the training one: only one can be kept.
      DataFault: more records than that do not decode, or as `EncodedDataset.read`.
    """
    size = dataset.num_examples * dataset.image_size[0] * dataset.image_size[1] * dataset.decoder.channels
    fits = dataset.native_size is not None and not dataset.crops_evaluation and size <= _AUTO_BYTES
    if cache == "memory" or (cache == "auto" and fits):
        return _decode_once(dataset, cache_dir, max_bad_share)
    dataset.max_bad_share = max_bad_share
    return dataset


def cache_root(cache_dir: str) -> Path:
    """Returns the directory of what is kept for the next start."""
    name = cache_dir or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "mae_dist")
    return Path(local(name, "data.cache_dir", "the cache is on a disk of each host; name a local path"))


def _decode_once(dataset: EncodedDataset, cache_dir: str, max_bad_share: float) -> ArrayDataset:
    """Returns the same examples in memory, resized to image_size, without undecodable ones."""
    if dataset.crops_evaluation:
        raise ConfigError(
            f"data.cache='memory' keeps one image of each example, and of {dataset.title} at {dataset.image_size} "
            "pixels evaluation sees a smaller crop than training; use data.cache='stream'"
        )
    identity = dict(dataset.identity)
    if dataset.native_size != dataset.image_size:
        identity["resized"] = "at load"  # a random crop of what is stored is not one of the original
    entry = _entry_path(dataset, identity, cache_dir)
    decoded = stored = _open_entry(entry)
    if decoded is None:
        decoded = _decode(dataset, max_bad_share)
        _write_entry(entry, *decoded)
        stored = _open_entry(entry)
    columns, meta = stored or decoded
    _check_fraction(meta["bad_records"], dataset.num_examples, max_bad_share)
    identity |= {"count": len(columns["label"]), "left_out": meta["bad_positions"]}
    return ArrayDataset(
        columns,
        num_classes=dataset.num_classes,
        class_names=dataset.class_names,
        fingerprint=digest(identity) if meta["bad_positions"] or "resized" in identity else dataset.fingerprint,
        bad_records=tuple(meta["bad_records"]),
        paths=_paths(entry) if stored else {},
    )


def _entry_path(dataset: EncodedDataset, identity: dict[str, Any], cache_dir: str) -> Path:
    version = _RESIZED_VERSION if "resized" in identity else 1
    key = digest(identity | {"files": dataset.stats, "entry_version": version})
    title = re.sub(r"[^\w.-]+", "_", dataset.title.replace(" split ", "-")).strip("_")
    return cache_root(cache_dir) / f"{title}-{key[:16]}"


def _paths(entry: Path) -> dict[str, Path]:
    return {name: entry / f"{name}.npy" for name in _COLUMNS}


def _open_entry(entry: Path) -> tuple[_Columns, _Meta] | None:
    """Maps the columns and reads the meta of an entry; None if it is absent or corrupted."""
    if not entry.exists():
        return None
    try:
        meta = json.loads((entry / "meta.json").read_text())
        columns = {name: map_array(path) for name, path in _paths(entry).items()}
        # Reading all of it once costs a tenth of a second for CIFAR and brings it into the page cache.
        wrong = [name for name in _COLUMNS if zlib.crc32(columns[name].data) != meta["crc32"][name]]
        if wrong:
            raise ValueError(f"checksum of {', '.join(wrong)}")
        return columns, meta
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        fault = str(error) or type(error).__name__
        _LOG.warning("the decoded copy %s is corrupted (%s) and is made again", entry, fault)
        return None


def _decode(dataset: EncodedDataset, max_bad_share: float) -> tuple[_Columns, _Meta]:
    images = np.empty((dataset.num_examples, *dataset.image_size, dataset.decoder.channels), dataset.dtype)
    labels = np.empty(dataset.num_examples, np.int32)
    bad = np.zeros(dataset.num_examples, bool)

    def decode(start: int) -> None:
        rows = np.arange(start, min(start + _CHUNK, dataset.num_examples))
        columns, bad[rows] = dataset.read(rows, evaluation=False)
        images[rows], labels[rows] = columns["image"], columns["label"]

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases the interpreter lock
        for _ in pool.map(decode, range(0, dataset.num_examples, _CHUNK)):
            pass
    positions = np.flatnonzero(bad).tolist()
    names = [dataset.fault(position) for position in positions]
    _check_fraction(names, dataset.num_examples, max_bad_share)
    columns = {"image": images, "label": labels}
    if positions:
        _LOG.warning("left out %d records that do not decode: %s", len(names), ", ".join(names))
        columns = {name: column[~bad] for name, column in columns.items()}
    return columns, {"bad_positions": positions, "bad_records": names}


def _check_fraction(bad_records: list[str], num_examples: int, max_bad_share: float) -> None:
    if len(bad_records) > max_bad_share * num_examples:
        raise DataFault(
            f"{len(bad_records)} of {num_examples} records do not decode, and data.max_bad_share is {max_bad_share:g}: "
            f"{', '.join(bad_records[:10])}; restore the files, or raise data.max_bad_share to leave such records out"
        )


def _write_entry(entry: Path, columns: _Columns, meta: _Meta) -> None:
    """Saves an entry, if no other process has; warns where that is not possible."""
    temporary = entry.with_name(f"{entry.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        for name, column in columns.items():
            np.save(temporary / f"{name}.npy", column)
        crc32 = {name: zlib.crc32(column.data) for name, column in columns.items()}
        (temporary / "meta.json").write_text(json.dumps(meta | {"crc32": crc32}))
        if entry.exists() and _open_entry(entry) is None:
            # Moved, not emptied in place: another process may have it mapped.
            corrupted = entry.with_name(f"{entry.name}.{uuid.uuid4().hex}.corrupted")
            entry.rename(corrupted)
            shutil.rmtree(corrupted, ignore_errors=True)
        if not entry.exists():
            temporary.rename(entry)
    except OSError as error:
        # Also where another process renamed its own entry first.
        if not entry.exists():
            _LOG.warning("the decoded images stay in memory only, %s cannot be written: %s", entry.parent, error)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
