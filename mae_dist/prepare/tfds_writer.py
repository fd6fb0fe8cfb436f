"""Images written as a TFDS data set of array_record files, without TensorFlow, shard by shard.

A shard is written under another name, synced and renamed, so it is whole or absent. They gather in a hidden directory
that gets the data set's name when all of it is there: a preparation that was killed goes on where it stopped.

Legend: N images of a split.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mae_dist import names, os_errors
from mae_dist.data import draws
from mae_dist.data.files import Progress, check_space, locked, remove_temporaries, run_all, temporary_beside
from mae_dist.errors import DataFault

_THREADS = 8  # reading waits for the disk, writing is C++
_OVERHEAD = 1.01  # of records and indices over the images' own bytes
_PLAN = "plan.json"
_INFO = "dataset_info.json"
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Images:
    """Encoded images of one split, where they lie: each a span of bytes of a file.

    Attributes:
      files: the images' own, or archives that hold many.
      file: which of them. # int (N,)
      offset: first byte. # int64 (N,)
      size: in bytes. # int64 (N,)
      names: of the images, each once.
      labels: numbers of their classes. # int32 (N,)
      mended: from name and content to the content to be stored.
    """

    files: tuple[str, ...]
    file: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    names: tuple[str, ...]
    labels: np.ndarray
    mended: Callable[[str, bytes], bytes] = lambda name, data: data

    def __post_init__(self) -> None:
        for name in self.names:
            if fault := names.text_fault(name):
                raise DataFault(f"the image {name!r} has {fault}: TFDS stores the name beside the image")

    def read(self, index: int) -> bytes:
        path, size = self.files[self.file[index]], int(self.size[index])
        with open(path, "rb") as file:
            data = os.pread(file.fileno(), size, int(self.offset[index]))
        if len(data) != size:
            raise DataFault(f"{path} ends within {self.names[index]}: it is truncated, or was changed meanwhile")
        return self.mended(self.names[index], data)

    def limited(self, count: int) -> "Images":
        """The first `count` in the order they are stored in, which mixes the classes."""
        rows = np.sort(self.order()[:count])
        return dataclasses.replace(
            self,
            file=self.file[rows],
            offset=self.offset[rows],
            size=self.size[rows],
            names=tuple(self.names[row] for row in rows),
            labels=self.labels[rows],
        )

    def order(self) -> np.ndarray:
        """The order they are stored in: mixed, so that a slice of the split has all classes. # (N,)"""
        return draws.permutation(0, 0, len(self.names))

    def digest(self) -> str:
        content = hashlib.sha256("\n".join(self.names).encode())
        content.update(self.labels.astype(np.int32).tobytes() + self.size.astype(np.int64).tobytes())
        return content.hexdigest()


@dataclasses.dataclass(frozen=True)
class _Shard:
    path: Path
    images: Images
    rows: np.ndarray  # of the images, in order

    def is_done(self) -> bool:
        from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

        if not self.path.exists():
            return False
        with contextlib.suppress(RuntimeError):
            reader = array_record_module.ArrayRecordReader(str(self.path))
            count = reader.num_records()
            reader.close()
            if count == len(self.rows):
                return True
        self.path.unlink()
        return False

    def write(self, features: Any) -> None:
        from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

        temporary = temporary_beside(self.path)
        try:
            writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")  # each can be read alone
            for row in self.rows.tolist():
                name, label = self.images.names[row], int(self.images.labels[row])
                example = {"image": self.images.read(row), "label": label, "file_name": name}
                writer.write(features.serialize_example(features.encode_example(example)))
            writer.close()
        except RuntimeError as error:  # what the writer says of a full disk
            raise OSError(str(error)) from error
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.rename(self.path)


def write_dataset(info: Any, directory: Path, splits: Mapping[str, Images]) -> None:
    """Writes what is missing of a data set and gives it its place; nothing to do if that exists.

    Args:
      info: a TFDS DatasetInfo with the features image, label and file_name; gets the splits.
      directory: the data set's place: <data_dir>/<name>/<version>.
      splits: name of the split -> its images.

    Raises:
      DataFault: too little space, a place that cannot be written, a source that changed.
    """
    incomplete = directory.with_name(f".{directory.name}.incomplete")
    try:
        with locked(incomplete.with_name(f".{directory.name}.lock")) as alone:
            if is_prepared(directory):
                return
            if alone:
                remove_temporaries(incomplete)
            _begin(incomplete, splits)
            shards = {name: _shards(info.name, incomplete, name, images) for name, images in splits.items()}
            _write_missing([shard for of_split in shards.values() for shard in of_split], info.features)
            _write_info(info, incomplete, shards)
            incomplete.rename(directory)
            (directory / _PLAN).unlink()  # not before: without it the shards would be made again
    except OSError as error:
        raise DataFault(
            f"preparing {info.name} in {directory} failed: {error}. "
            f"{os_errors.cure(error) or 'See whether the place can be written'}; the same command then goes on where "
            "it stopped"
        ) from error


def is_prepared(directory: Path) -> bool:
    """Whether a data set has its place already; an empty directory there is none.

    Raises:
      DataFault: something else is there.
    """
    if (directory / _INFO).exists():
        return True
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise DataFault(f"{directory} is in the way: it holds no {_INFO}; move or delete it")
    return False


def _begin(incomplete: Path, splits: Mapping[str, Images]) -> None:
    """Makes the hidden directory, empty unless it was begun from the same images."""
    plan = {name: images.digest() for name, images in splits.items()}
    path = incomplete / _PLAN
    if incomplete.exists() and (not path.exists() or json.loads(path.read_text()) != plan):
        _LOG.warning("%s was begun from other images and is made again", incomplete)
        shutil.rmtree(incomplete)
    incomplete.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    temporary.write_text(json.dumps(plan))
    temporary.rename(path)


def _shards(name: str, directory: Path, split: str, images: Images) -> list[_Shard]:
    """As many as TFDS would make."""
    from tensorflow_datasets.core.utils import shard_utils

    order = images.order()
    count = shard_utils.ShardConfig.calculate_number_shards(int(images.size.sum()), len(order))
    template = _template(name, directory, split)
    return [
        _Shard(Path(template.sharded_filepath(shard_index=number, num_shards=count)), images, rows)
        for number, rows in enumerate(np.array_split(order, count))
    ]


def _template(name: str, directory: Path, split: str) -> Any:
    from etils import epath
    from tensorflow_datasets.core import naming

    return naming.ShardedFileTemplate(
        data_dir=epath.Path(directory), dataset_name=name, split=split, filetype_suffix="array_record"
    )


def _write_missing(shards: list[_Shard], features: Any) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        done = list(pool.map(_Shard.is_done, shards))
        missing = [shard for shard, is_done in zip(shards, done, strict=True) if not is_done]
        if not missing:
            return
        sizes = {shard.path: int(shard.images.size[shard.rows].sum()) for shard in missing}
        check_space(missing[0].path.parent, int(sum(sizes.values()) * _OVERHEAD))
        _LOG.info("%d of %d shards are to be written in %s", len(missing), len(shards), missing[0].path.parent)
        progress = Progress("shards", len(missing), sum(sizes.values()))
        for shard in run_all(pool, lambda shard: shard.write(features), missing):
            progress.add(sizes[shard.path])


def _write_info(info: Any, directory: Path, shards: Mapping[str, list[_Shard]]) -> None:
    """dataset_info.json and features.json, by TFDS."""
    from tensorflow_datasets.core import splits

    infos = []
    for split, of_split in shards.items():
        infos.append(
            splits.SplitInfo(
                name=split,
                shard_lengths=[len(shard.rows) for shard in of_split],
                num_bytes=sum(shard.path.stat().st_size for shard in of_split),
                filename_template=_template(info.name, directory, split),
            )
        )
    info.set_file_format("array_record", override=True)
    info.set_splits(splits.SplitDict(infos))
    info.write_to_directory(directory)
