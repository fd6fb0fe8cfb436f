"""Splits by names and hashes, numbered labels and the images' type, for all sources of many image files.

Examples are in the order of a hash of their names, so that any slice of a split is a random part of it, and an image
stays in its split when others are added.

Legend: N images of a listing.
"""

import dataclasses
import hashlib
import logging
import os
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mae_dist.data.dataset import Dataset
from mae_dist.data.decode import Decoder, stored_dtype
from mae_dist.data.image_files import DTYPES, UndecodableImage
from mae_dist.data.sources import listing as listings
from mae_dist.data.sources.cache import cached
from mae_dist.data.sources.encoded import EncodedDataset
from mae_dist.data.sources.listing import Listing, Names, readable
from mae_dist.data.splits import parse_split
from mae_dist.errors import ConfigError, DataFault

# Names of directories, and within those of files, -> the split that they mean.
SPLITS = {
    **dict.fromkeys((b"train", b"training"), "train"),
    **dict.fromkeys((b"val", b"valid", b"validation", b"dev"), "val"),
    **dict.fromkeys((b"test", b"testing"), "test"),
}
SPLIT_TYPE = "<U5"
_8_BITS = (b".jpg", b".jpeg", b".jpe", b".jfif", b".mpo", b".webp", b".bmp", b".gif")
_SAMPLE = 64  # files whose headers say what all are
_LOG = logging.getLogger(__name__)


class Table(NamedTuple):
    """The images of a listing that are used, in their order.

    Attributes:
      rows: of the listing, by base split: "train", "val", "test" and "all".
      labels: of all rows of the listing, -1 without one. # (N,) int32
      class_names: in the order of their labels; () without labels.
    """

    rows: dict[str, np.ndarray]
    labels: np.ndarray
    class_names: tuple[str, ...]


class ListedDataset(EncodedDataset):
    """Decodes images of a listing; a subclass says how one is read."""

    def __init__(
        self, listing: Listing, rows: np.ndarray, labels: np.ndarray, cache_dir: str, total: int, **description: Any
    ):
        """Takes the images at `rows` of a listing, of `total` in all splits; the rest is for `EncodedDataset`."""
        super().__init__(num_examples=len(rows), **description)
        self.fingerprint += f"-{listing.digest}"
        self._listing, self._rows, self._cache_dir, self._total = listing, rows, cache_dir, total
        self.root, self.names, self.labels = listing.root, Names([listing.names[row] for row in rows]), labels[rows]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_listing", "_rows")}

    @property
    def stats(self) -> list[Any]:
        return [self._listing.digest, hashlib.sha256(self._listing.times[self._rows].tobytes()).hexdigest()]

    @property
    def total_examples(self) -> int:
        return self._total

    def file_name(self, index: int) -> str:
        return readable(self.names[index])

    def record_name(self, index: int) -> str:
        return readable(os.path.join(self.root, self.names[index]))

    def changes(self, fingerprint: str) -> str:
        return listings.differences(fingerprint.partition("-")[2], self._listing, self._cache_dir)

    def encoded(self, indices: np.ndarray) -> tuple[list[bytes | None], np.ndarray]:
        return self.files(indices), self.labels[indices]

    @abstractmethod
    def files(self, indices: np.ndarray) -> list[bytes | None]:
        """Reads the images' files, None where there is none. # (n,) -> n"""


def split_of_file(name: bytes) -> str:
    """Returns the base split that a word of a file's name means, or else a directory's; "train" if none does."""
    for part in reversed(name.lower().split(b"/")):
        for word in re.split(rb"[^a-z]+", part):
            if word in SPLITS:
                return SPLITS[word]
    return "train"


class Opened(NamedTuple):
    """The listing, table and decoder that the splits of a source share.

    Attributes:
      make: takes the listing, rows and the rest as `ListedDataset`.
      listing: what the table's rows are of.
      table: splits and labels.
      decoder: what `choose_decoder` returned.
    """

    make: Callable[..., ListedDataset]
    listing: Listing
    table: Table
    decoder: tuple[Decoder, tuple[int, int] | None]


def name_hash(name: bytes) -> int:
    """Returns 64 bits that depend on a name alone, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")


def make_table(
    keys: list[bytes], splits: np.ndarray, labels: np.ndarray, class_names: list[str], val_fraction: float
) -> Table:
    """Orders the images by a hash of their keys, and draws "val" from "train" if nothing is in it.

    Args:
      keys: what is hashed: names, or the part of them that an image keeps.
      splits: "train", "val", "test" or "", not used. # (N,)
      labels: -1 without one. # (N,) int32
      class_names: in the order of the labels.
      val_fraction: of "train" that becomes "val".
    """
    splits = splits.copy()
    hashes = np.array([name_hash(key) for key in keys], np.uint64)
    order = np.argsort(hashes, kind="stable")
    if not (splits == "val").any():
        drawn = hashes < np.uint64(min(int(val_fraction * 2**64), 2**64 - 1))
        train = np.flatnonzero(splits == "train")
        if val_fraction and not drawn[train].any() and len(train) > 1:
            drawn[train[np.argmin(hashes[train])]] = True  # of few files one
        splits[drawn & (splits == "train")] = "val"
    rows = {name: order[splits[order] == name] for name in ("train", "val", "test")}
    return Table({**rows, "all": order[splits[order] != ""]}, labels, tuple(class_names))


def number_labels(texts: Mapping[int, str], count: int) -> tuple[np.ndarray, list[str]]:
    """Numbers labels by their value, or else by name; returns those of `count` rows, -1 without one, and the classes.

    # -> (count,) int32
    """
    names = sorted(set(texts.values()), key=_by_number)
    numbers = {name: number for number, name in enumerate(names)}
    labels = np.full(count, -1, np.int32)
    for row, text in texts.items():
        labels[row] = numbers[text]
    return labels, names


def _by_number(name: str) -> tuple[int, float, str]:
    """Sorts numbers by their value, before other names."""
    try:
        return 0, float(name), name
    except ValueError:
        return 1, 0.0, name


def survey(
    make: Callable[..., ListedDataset],
    listing: Listing,
    table: Table,
    read: Callable[[int], bytes | None],
    decoder: Decoder,
    dtype: str,
    *,
    cache_dir: str,
    sample: np.ndarray | None = None,
) -> Opened:
    """Keeps the listing, logs the sizes of the splits and what was left out, and chooses the decoder.

    Args:
      make: as in `Opened`, like listing and table.
      read: row of the listing -> file.
      decoder: as for `choose_decoder`, like dtype.
      cache_dir: where lists of files are kept.
      sample: rows that may be looked at; None: all.

    Raises:
      DataFault: none of the images looked at decodes.
    """
    listings.keep(listing, cache_dir)
    counts = ", ".join(f"{name} {len(rows)}" for name, rows in table.rows.items() if name != "all")
    _LOG.info("%s: %s; %d classes", readable(listing.root), counts, len(table.class_names))
    if str(listing.left_out):
        _LOG.warning("%s: %s", readable(listing.root), listing.left_out)
    rows = table.rows["all"] if sample is None else sample
    return Opened(make, listing, table, choose_decoder(listing, rows, read, decoder, dtype))


def open_listed(
    split: str,
    opened: Opened,
    *,
    source: str,
    image_size: tuple[int, int],
    cache: str,
    cache_dir: str,
    max_bad_share: float,
) -> Dataset:
    """Opens a split of a table.

    Args:
      split: a split expression over "train", "val" (or "validation"), "test" and "all".
      opened: what all splits have in common.
      source: the name of the source.
      image_size: (height, width) of the images given out.
      cache: "memory" decodes once; "auto" and "stream" decode when read.
      cache_dir: where decoded images and lists of files are kept.
      max_bad_share: the largest fraction of files that may be skipped because they do not decode.

    Raises:
      ConfigError: a split that is empty or none.
    """
    listing, table = opened.listing, opened.table
    sizes = {name: len(rows) for name, rows in table.rows.items()}
    try:
        spans = parse_split(split, {**sizes, "validation": sizes["val"]})
    except ConfigError as error:
        raise ConfigError(
            f"{error}. Leave a split out by an empty data.val_split or data.test_split, or change data.val_fraction"
        ) from error
    base = {**table.rows, "validation": table.rows["val"]}
    rows = np.concatenate([base[span.name][span.start : span.stop] for span in spans])
    dataset = opened.make(
        listing,
        rows,
        table.labels,
        cache_dir,
        sizes["all"],
        title=f"{readable(listing.root)} split {split!r}",
        identity={
            "source": source,
            "split": split,
            "listing": listing.digest,
            "labels": hashlib.sha256(table.labels[rows].tobytes()).hexdigest(),
            "classes": table.class_names,
            "rows": hashlib.sha256(rows.tobytes()).hexdigest(),
        },
        image_size=image_size,
        decoder=opened.decoder[0],
        native_size=opened.decoder[1],
        class_names=table.class_names,
    )
    return cached(
        dataset, cache="stream" if cache == "auto" else cache, cache_dir=cache_dir, max_bad_share=max_bad_share
    )


def choose_decoder(
    listing: Listing, rows: np.ndarray, read: Callable[[int], bytes | None], decoder: Decoder, dtype: str
) -> tuple[Decoder, tuple[int, int] | None]:
    """Returns how to decode all images, and their size if they have one, by some of them.

    Args:
      listing: has their names.
      rows: of the listing, that may be looked at.
      read: row -> file.
      decoder: without `dtype`.
      dtype: of the images given out; "auto" is the type of most values among those looked at.

    Raises:
      DataFault: none of these decodes.
    """
    chosen = rows[:: max(1, len(rows) // _SAMPLE)][:_SAMPLE].tolist()
    maybe_deep = [row for row in rows.tolist() if not listing.names[row].lower().endswith(_8_BITS)]
    found: set[str | None] = set()
    for row in maybe_deep[:: max(1, len(maybe_deep) // _SAMPLE)][:_SAMPLE] if dtype == "auto" else ():
        data = read(row)
        found.add(stored_dtype(data, decoder) if data else None)
    known = [name for name in DTYPES if name in found] or ["uint8"]
    result = dataclasses.replace(decoder, dtype=known[-1] if dtype == "auto" else dtype, deeper=dtype != "auto")
    sizes, faults = set(), []
    for row in chosen:
        data = read(row) or b""
        sizes.add(result.header(data)[:2])
        try:
            result.decode(data)
        except UndecodableImage as error:
            faults.append(f"{readable(listing.names[row])}: {error}")
    if len(faults) == len(chosen):
        raise DataFault(f"of {len(chosen)} files in {readable(listing.root)} none decodes; {'; '.join(faults[:3])}")
    sizes.discard((0, 0))
    return result, sizes.pop() if len(sizes) == 1 else None
