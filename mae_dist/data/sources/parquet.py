"""Images in Parquet files, as Hugging Face's hub has them, read where they are: `data.source="parquet"`.

An image is bytes, or a struct {bytes, path}. Parquet is read by row groups, some of which are kept: where a set is
larger than what is kept, every image costs the reading of its row group.
"""

import collections
import functools
import json
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mae_dist.data.dataset import Dataset
from mae_dist.data.decode import Decoder
from mae_dist.data.image_files import MAX_PIXELS
from mae_dist.data.sources import listing as listings
from mae_dist.data.sources import register_source
from mae_dist.data.sources.listed import (
    SPLIT_TYPE,
    ListedDataset,
    make_table,
    number_labels,
    open_listed,
    split_of_file,
    survey,
)
from mae_dist.data.sources.listing import Listing
from mae_dist.errors import ConfigError, DataFault

if TYPE_CHECKING:  # its import takes a quarter of a second, which other sources need not wait for
    import pyarrow as pa
    from pyarrow import parquet

_THREADS = 16  # they wait for the disk
_KEPT_BYTES = 512 * 1024**2  # of row groups, in each process
_SAMPLED = 4, 16  # row groups, and images of each, whose headers say what all are
_LOG = logging.getLogger(__name__)


class _Place(NamedTuple):
    """Where the image of a row is."""

    path: str
    group: int
    row: int  # in the group


class _Files(NamedTuple):
    """Row groups of all files. # (groups,)"""

    paths: list[str]
    column: str  # of the images; "image.bytes" of a struct
    file: np.ndarray
    group: np.ndarray  # within the file
    starts: np.ndarray  # number of the first row over all files

    def place(self, row: int) -> _Place:
        at = int(np.searchsorted(self.starts, row, side="right")) - 1
        return _Place(self.paths[self.file[at]], int(self.group[at]), row - int(self.starts[at]))


class _RowGroups:
    """Reads row groups, and keeps the last ones."""

    def __init__(self) -> None:
        self._kept: collections.OrderedDict[tuple[str, int, int, str], pa.ChunkedArray] = collections.OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: str, group: int, column: str) -> "pa.ChunkedArray":
        """Returns a column of a row group."""
        from pyarrow import parquet

        key = path, os.stat(path).st_mtime_ns, group, column
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        with parquet.ParquetFile(path, metadata=_metadata(path)) as file:
            values = file.read_row_group(group, columns=[column], use_threads=False).column(0)
        with self._lock:
            self._kept[key] = values
            while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > _KEPT_BYTES:
                self._kept.popitem(last=False)
        return values


_GROUPS = _RowGroups()


def _metadata(path: str) -> "parquet.FileMetaData":
    return _read_metadata(path, os.stat(path).st_mtime_ns)


@functools.lru_cache(4096)
def _read_metadata(path: str, time: int) -> "parquet.FileMetaData":
    from pyarrow import parquet

    del time  # in the key of the cache
    return parquet.read_metadata(path)


class ParquetDataset(ListedDataset):
    """Reads images of Parquet files."""

    def __init__(self, files: _Files, listing: Listing, rows: np.ndarray, *rest: Any, **fields: Any):
        """Takes the images at `rows` of all files; `rest` and `fields` are for `ListedDataset`."""
        super().__init__(listing, rows, *rest, **fields)
        self._files, self._numbers = files, rows

    def files(self, indices: np.ndarray) -> list[bytes | None]:
        numbers = self._numbers[indices]
        found: list[bytes | None] = [None] * len(numbers)
        for at in np.argsort(numbers).tolist():  # those of one row group after another
            found[at] = _read(self._files, int(numbers[at]))
        return found


def _read(files: _Files, row: int) -> bytes | None:
    import pyarrow as pa

    place = files.place(row)
    try:
        value = _GROUPS.read(place.path, place.group, files.column)[place.row].as_py()
    except (OSError, pa.ArrowException, IndexError):  # named like one that does not decode
        return None
    return value["bytes"] if isinstance(value, dict) else value


@register_source("parquet")
def open_parquet(
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
    """Opens Parquet files of images.

    The base splits are "train", "val" and "test" (and "all"), by words in the names of files, or of their directories;
    other files are "train". Without a file of "val" a fraction of "train", drawn by a hash of each name, is "val".

    Args:
      split: a split expression, as for `open_split`.
      data_dir: .parquet files: a directory, several paths separated by commas, or a glob.
      labels: "none", or "column:NAME". Numbers are named as Hugging Face's metadata in the files says.
      val_fraction: of the images of "train".

    The other arguments are those of `open_folder`.

    Raises:
      ConfigError: an argument that cannot work, as a column that is not there.
      DataFault: a file is corrupted, or there is no image, or none that decodes.
    """
    if "opened" not in shared:
        shards = listings.find_files(data_dir, (b".parquet",), "parquet", "Parquet file")
        files = _index(shards)
        counts = np.array([_metadata(path).num_rows for path in files.paths])
        if not counts.sum():
            raise DataFault(f"the Parquet files of data.data_dir={data_dir} have no rows")
        names = [b"%s/%d" % (name, row) for name, n in zip(shards.names, counts, strict=True) for row in range(n)]
        sizes, times = (np.repeat(values, counts) for values in (shards.sizes, shards.times))
        listing = Listing(shards.root, names, sizes, times, shards.left_out)
        splits = np.repeat(np.array([split_of_file(name) for name in shards.names], SPLIT_TYPE), counts)
        numbered = np.full(len(names), -1, np.int32), []
        if labels != "none":
            numbered = _labels(files, labels.removeprefix("column:"), len(names))
        table = make_table(names, splits, *numbered, val_fraction)
        _warn_if_slow(files, len(names))
        shared["opened"] = survey(
            functools.partial(ParquetDataset, files),
            listing,
            table,
            functools.partial(_read, files),
            Decoder(channels, "float32", max_value, background, exif, max_pixels=max_pixels),
            dtype,
            cache_dir=cache_dir,
            sample=_sample(files, len(names)),
        )
    return open_listed(
        split,
        shared["opened"],
        source="parquet",
        image_size=image_size,
        cache=cache,
        cache_dir=cache_dir,
        max_bad_share=max_bad_share,
    )


def _index(shards: Listing) -> _Files:
    """Finds the row groups, and the column of the images."""
    import pyarrow as pa

    paths = [os.fsdecode(os.path.join(shards.root, name)) for name in shards.names]

    def group_sizes(path: str) -> list[int]:
        try:
            found = _metadata(path)
        except (OSError, pa.ArrowException) as error:
            raise DataFault(f"{path} is no Parquet file, or corrupted ({error}); restore it") from error
        return [found.row_group(group).num_rows for group in range(found.num_row_groups)]

    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = list(pool.map(group_sizes, paths))
    ends = np.cumsum([size for of_file in sizes for size in of_file], dtype=np.int64)
    return _Files(
        paths,
        _image_column(_metadata(paths[0]).schema.to_arrow_schema(), paths[0]),
        np.repeat(np.arange(len(paths)), [len(of_file) for of_file in sizes]),
        np.concatenate([np.arange(len(of_file)) for of_file in sizes]),
        np.concatenate([[0], ends[:-1]]) if len(ends) else ends,
    )


def _image_column(schema: "pa.Schema", path: str) -> str:
    """Returns the column to read; of several that may be images, the one called image, or img."""
    import pyarrow as pa

    found = {}
    for field in schema:
        kind = field.type
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            found[field.name] = field.name
        elif pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            found[field.name] = f"{field.name}.bytes"
    for name in ("image", "img", *(found if len(found) == 1 else ())):
        if name in found:
            return found[name]
    raise ConfigError(
        f"{path} has the columns {', '.join(schema.names)}; needed is one of bytes, or of structs with the field "
        "bytes, called image if there are several"
    )


def _labels(files: _Files, column: str, count: int) -> tuple[np.ndarray, list[str]]:
    """Returns the labels in a column, -1 for null, and the names of the classes. # -> (N,) int32"""
    from pyarrow import parquet

    def read(path: str) -> list[Any]:
        schema = _metadata(path).schema.to_arrow_schema()
        if column not in schema.names:
            raise ConfigError(f"data.labels='column:{column}': {path} has the columns {', '.join(schema.names)}")
        with parquet.ParquetFile(path) as file:
            return file.read(columns=[column]).column(0).to_pylist()

    with ThreadPoolExecutor(_THREADS) as pool:
        values = [value for of_file in pool.map(read, files.paths) for value in of_file]
    names = _class_names(_metadata(files.paths[0]).schema.to_arrow_schema(), column)
    if names:
        numbers = np.array([-1 if value is None else value for value in values], np.int64)
        if not ((numbers >= -1) & (numbers < len(names))).all():
            raise DataFault(
                f"the column {column} has other numbers than 0 .. {len(names) - 1}, the classes in {files.paths[0]}"
            )
        return numbers.astype(np.int32), names
    return number_labels({row: str(value) for row, value in enumerate(values) if value is not None}, count)


def _class_names(schema: "pa.Schema", column: str) -> list[str]:
    """Returns the names that Hugging Face's metadata gives the numbers of a column, [] if there are none."""
    try:
        return list(json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]["names"])
    except (KeyError, TypeError, ValueError):
        return []


def _sample(files: _Files, count: int) -> np.ndarray:
    """Returns rows of few row groups, so that few have to be read."""
    groups, images = _SAMPLED
    first = files.starts[:: max(1, len(files.starts) // groups)][:groups]
    rows = (first[:, None] + np.arange(images)).ravel()
    return np.unique(rows[rows < count])


def _warn_if_slow(files: _Files, count: int) -> None:
    """Says what random access costs where the row groups are not kept."""
    found = [_metadata(path) for path in files.paths]
    size = sum(file.row_group(group).total_byte_size for file in found for group in range(file.num_row_groups))
    if size > _KEPT_BYTES and count > len(files.starts):
        _LOG.warning(
            "%.1f GB in %d row groups of about %d images: each image read costs a row group of %.0f MB; smaller row "
            "groups, or tar files with data.source='tar', are faster",
            *(size / 1e9, len(files.starts), count // len(files.starts), size / len(files.starts) / 1e6),
        )
