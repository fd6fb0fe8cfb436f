"""Image files in directories, read where they are: `data.source="folder"`.

Examples are in the order of a hash of their names, so that any slice of a split is a random part of it, and a file
stays in its split when others are added.
"""

import csv
import os
from typing import Any

import numpy as np

from mae_dist.data.dataset import Dataset
from mae_dist.data.decode import Decoder
from mae_dist.data.image_files import MAX_PIXELS
from mae_dist.data.sources import listing as listings
from mae_dist.data.sources import register_source
from mae_dist.data.sources.listed import (
    SPLIT_TYPE,
    SPLITS,
    ListedDataset,
    Opened,
    Table,
    choose_decoder,
    make_table,
    number_labels,
    open_listed,
    survey,
)
from mae_dist.data.sources.listing import Listing, readable
from mae_dist.errors import ConfigError, DataFault

_HEADERS = ("path", "file", "filename", "file_name", "image", "name")


class FolderDataset(ListedDataset):
    """Reads the files of a listing."""

    def files(self, indices: np.ndarray) -> list[bytes | None]:
        return [_read(self.root, self.names[index]) for index in indices.tolist()]


def _read(root: bytes, name: bytes) -> bytes | None:
    try:
        with open(os.path.join(root, name), "rb") as file:
            return file.read()
    except OSError:  # named like one that does not decode
        return None


@register_source("folder")
def open_folder(
    split: str,
    *,
    data_dir: str,
    image_size: tuple[int, int],
    channels: int,
    cache: str,
    cache_dir: str,
    max_bad_share: float,
    labels: str = "none",
    val_fraction: float = 0.0,
    dtype: str = "auto",
    max_value: float = 0.0,
    background: float = 1.0,
    max_pixels: int = MAX_PIXELS,
    exif: bool = True,
    shared: dict[str, Any],
) -> Dataset:
    """Opens image files where they are.

    The base splits are "train", "val" and "test" (and "all"): the directories of these names, also "validation" and
    "valid". Without val/ a fraction of the training files, drawn by a hash of each name, is "val".

    Args:
      split: a split expression, as for `open_split`.
      data_dir: as for `find_images`.
      image_size: (height, width) of the images given out.
      channels: as for `Decoder`, like max_value, background, max_pixels and exif.
      labels: "none"; "folders", the directory below data_dir, or below train/, val/ and test/; or "csv:FILE" of lines
        path,label or path,label,split, which then names the files that are used.
      val_fraction: of the files without a split of their own.
      dtype: of the images given out; "auto" is the type of most values among the first files.
      cache: "memory" decodes once; "auto" and "stream" decode when read.
      cache_dir: where decoded images and lists of files are kept.
      max_bad_share: the largest fraction of files that may be skipped because they do not decode.
      shared: where the listing is kept for the other splits of the same run.

    Raises:
      ConfigError: an argument that cannot work.
      DataFault: no image is there, or none that decodes.
    """
    if "opened" not in shared:
        listing = listings.find_images(data_dir)
        shared["opened"] = survey(
            FolderDataset,
            listing,
            tabulate(listing, labels, val_fraction),
            lambda row: _read(listing.root, listing.names[row]),
            Decoder(channels, "float32", max_value, background, exif, max_pixels=max_pixels),
            dtype,
            cache_dir=cache_dir,
        )
    return open_listed(
        split,
        shared["opened"],
        source="folder",
        image_size=image_size,
        cache=cache,
        cache_dir=cache_dir,
        max_bad_share=max_bad_share,
    )


def open_in_order(listing: Listing, image_size: tuple[int, int], decoder: Decoder) -> Dataset:
    """Opens all files of a listing in its order, without labels. Any number of them may not decode.

    Raises:
      DataFault: of a sample of the files none decodes.
    """
    rows = np.arange(len(listing.names))
    table = Table(
        {**dict.fromkeys(("train", "val", "test"), rows[:0]), "all": rows}, np.full(len(rows), -1, np.int32), ()
    )
    chosen = choose_decoder(listing, rows, lambda row: _read(listing.root, listing.names[row]), decoder, decoder.dtype)
    opened = Opened(FolderDataset, listing, table, chosen)
    return open_listed(
        "all", opened, source="folder", image_size=image_size, cache="stream", cache_dir="", max_bad_share=1.0
    )


def tabulate(listing: Listing, labels: str, val_fraction: float, *, has_splits: bool | None = None) -> Table:
    """Gives the files of a listing their splits and labels; counts those without a split among its `left_out`.

    Args:
      listing: of the files.
      labels: as for `open_folder`, like val_fraction.
      has_splits: as for `directory_splits`.
    """
    count = len(listing.names)
    splits, depth = directory_splits(listing, has_splits)
    numbers, class_names = np.full(count, -1, np.int32), []
    if labels == "folders":
        numbers, class_names = _folder_labels(listing, splits, depth)
    elif labels != "none":
        splits, numbers, class_names = _csv_labels(listing, splits, labels.removeprefix("csv:"))
    return make_table(listing.names, splits, numbers, class_names, val_fraction)


def directory_splits(listing: Listing, has_splits: bool | None = None) -> tuple[np.ndarray, int]:
    """Returns the base split of each file by its first directory, and how many directories that takes.

    Args:
      listing: of the files.
      has_splits: whether directories are those of splits; None: if there is train/ and nothing but splits beside it, or
        also val/ or test/: a vehicle may be a train.
    """
    tops = [name.partition(b"/")[0].lower() if b"/" in name else b"" for name in listing.names]
    kinds = {top: SPLITS.get(top) for top in set(tops)}
    present = set(kinds.values())
    has_others = any(kind is None and top for top, kind in kinds.items())
    if has_splits is None:
        has_splits = "train" in present and (not has_others or bool(present & {"val", "test"}))
    if not has_splits:
        return np.full(len(tops), "train", SPLIT_TYPE), 0
    for name, top in zip(listing.names, tops, strict=True):
        if kinds[top] is None:
            listing.left_out.add(name, "beside the directories of the splits")
    return np.array([kinds[top] or "" for top in tops], SPLIT_TYPE), 1


def _folder_labels(listing: Listing, splits: np.ndarray, depth: int) -> tuple[np.ndarray, list[str]]:
    """Returns the labels by directory, and their names; files outside one leave their split."""
    parts = [name.split(b"/") for name in listing.names]
    classes = [part[depth] if len(part) > depth + 1 else None for part in parts]
    for row, name in enumerate(classes):
        if name is None and splits[row]:
            listing.left_out.add(listing.names[row], "outside the directories of the classes")
            splits[row] = ""
    names = sorted({name for row, name in enumerate(classes) if name is not None and splits[row] == "train"})
    others = {name for row, name in enumerate(classes) if name is not None and splits[row]} - set(names)
    if not names:
        raise DataFault(
            f"{readable(listing.root)} has no directories of classes, which data.labels='folders' needs; set "
            "data.labels='none' to train without labels"
        )
    if others:
        raise DataFault(
            f"{readable(listing.root)}: the classes {sorted(map(readable, others))[:10]} of val/ or test/ are not in "
            "train/; rename or remove them, or add them there"
        )
    numbers = {name: number for number, name in enumerate(names)}
    labels = [numbers.get(name, -1) if name is not None else -1 for name in classes]
    return np.array(labels, np.int32), [readable(name) for name in names]


def _csv_labels(listing: Listing, splits: np.ndarray, path: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Returns the splits and labels that a table gives the files that it names, and the classes."""
    positions = {name: row for row, name in enumerate(listing.names)}
    found = np.full(len(splits), "", splits.dtype)
    texts: dict[int, str] = {}
    missing = []
    for number, cells in enumerate(_csv_rows(path), start=1):
        name = os.path.normpath(os.path.join(listing.root, os.fsencode(cells[0])))
        row = positions.get(os.path.relpath(name, listing.root))
        if row is None:
            missing.append(f"{cells[0]} (line {number})")
            continue
        given = cells[2].strip().lower() if len(cells) > 2 else ""
        if given and os.fsencode(given) not in SPLITS:
            raise DataFault(f"{path}, line {number}: the split {given!r} is none of train, val, test")
        found[row] = SPLITS[os.fsencode(given)] if given else splits[row] or "train"
        if cells[1].strip():
            texts[row] = cells[1].strip()
    if missing:
        raise DataFault(
            f"{path} names {len(missing)} files that are not images in {readable(listing.root)}: "
            f"{', '.join(missing[:10])}; write paths relative to data.data_dir"
        )
    for row in np.flatnonzero((found == "") & (splits != "")).tolist():
        listing.left_out.add(listing.names[row], "not in the table of labels")
    return found, *number_labels(texts, len(splits))


def _csv_rows(path: str) -> list[list[str]]:
    """Reads the lines of a table without its header."""
    try:
        with open(os.path.expanduser(path), newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = [row for row in csv.reader(file) if row]
    except OSError as error:
        raise ConfigError(f"data.labels='csv:{path}' cannot be read: {error}") from error
    if rows and rows[0][0].strip().lower() in _HEADERS:
        rows = rows[1:]
    short = [row for row in rows if len(row) < 2]
    if short or not rows:
        raise DataFault(f"{path}: {short[:1] or 'an empty table'}; needed are lines of path,label or path,label,split")
    return rows
