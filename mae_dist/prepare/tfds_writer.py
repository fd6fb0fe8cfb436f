"""Writes images as a TFDS data set of array_record files, without TensorFlow, shard by shard.

A shard is written under another name, synced and renamed, so it is whole or absent. They gather in a hidden directory
that gets the data set's name when all of it is there: a preparation that was killed goes on where it stopped.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from mae_dist import os_errors
from mae_dist.data import draws
from mae_dist.data.files import Progress, check_space, locked, remove_temporaries, run_all, temporary_beside
from mae_dist.data.sources.tfds import num_records
from mae_dist.errors import DataFault
from mae_dist.storage import write_text_atomically

_THREADS = 8  # reading waits for the disk, writing is C++
_OVERHEAD = 1.01  # of records and indices over the images' own bytes
_PLAN = "plan.json"
_INFO = "dataset_info.json"
_LOG = logging.getLogger(__name__)


class Image(NamedTuple):
    """An encoded image where it lies: a span of bytes of a file.

    Attributes:
      name: of the image, unique in its split.
      label: number of its class, -1 without one.
      path: its own file, or an archive that holds many.
      offset: first byte.
      size: in bytes.
    """

    name: str
    label: int
    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            data = os.pread(file.fileno(), self.size, self.offset)
        if len(data) != self.size:
            raise DataFault(f"{self.path} ends within {self.name}: it is truncated, or was changed meanwhile")
        return data


def stored_order(count: int) -> np.ndarray:
    """Returns the order in which `count` images are stored: mixed, so that a slice has all classes. # (count,)"""
    return draws.permutation(0, 0, count)


Convert = Callable[[str, bytes], bytes | np.ndarray]  # name and content of an image -> what is stored


class _Shard(NamedTuple):
    path: Path
    images: list[Image]

    @property
    def size(self) -> int:
        return sum(image.size for image in self.images)

    def is_done(self) -> bool:
        with contextlib.suppress(RuntimeError):
            if self.path.exists() and num_records(self.path) == len(self.images):
                return True
        self.path.unlink(missing_ok=True)
        return False

    def write(self, features: Any, convert: Convert) -> None:
        from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

        temporary = temporary_beside(self.path)
        try:
            writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")  # each can be read alone
            for image in self.images:
                data = convert(image.name, image.read())
                label = {"label": image.label} if "label" in features else {}
                example = {"image": data, **label, "file_name": image.name}
                writer.write(features.serialize_example(features.encode_example(example)))
            writer.close()
        except RuntimeError as error:  # what the writer says of a full disk
            raise OSError(str(error)) from error
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.rename(self.path)


def write_dataset(
    info: Any,
    directory: Path,
    splits: Mapping[str, list[Image]],
    convert: Convert = lambda name, data: data,
    *,
    conversion: str = "",
    shrinks: bool = False,
    write_beside: Callable[[Path], None] = lambda directory: None,
) -> None:
    """Writes what is missing of a data set and gives it its place; does nothing if that exists.

    Args:
      info: a TFDS DatasetInfo with the features image, file_name and perhaps label; gets the splits.
      directory: the data set's place: <data_dir>/<name>/<version>.
      splits: name of the split -> its images.
      convert: name and content of an image -> the content to be stored.
      conversion: describes `convert`: what was begun with another one is begun again.
      shrinks: true if `convert` makes files much smaller, so that the space they take is not known before.
      write_beside: adds further files to the directory that it gets.

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
            _begin(incomplete, splits, conversion)
            shards = {name: _shards(info.name, incomplete, name, images) for name, images in splits.items()}
            all_shards = [shard for of_split in shards.values() for shard in of_split]
            _write_missing(all_shards, info.features, convert, shrinks)
            _write_info(info, incomplete, shards)
            write_beside(incomplete)
            incomplete.rename(directory)
            (directory / _PLAN).unlink()  # not before: without it the shards would be made again
    except OSError as error:
        raise DataFault(
            f"preparing {info.name} in {directory} failed: {error}. "
            f"{os_errors.cure(error) or 'See whether the place can be written'}; the same command then goes on where "
            "it stopped"
        ) from error


def is_prepared(directory: Path) -> bool:
    """True if a data set has its place already; an empty directory there is none.

    Raises:
      DataFault: something else is there.
    """
    if (directory / _INFO).exists():
        return True
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise DataFault(f"{directory} is in the way: it holds no {_INFO}; move or delete it")
    return False


def _begin(incomplete: Path, splits: Mapping[str, list[Image]], conversion: str = "") -> None:
    """Makes the hidden directory, empty unless it was begun from the same images in the same way."""
    plan = {name: _digest(images) for name, images in splits.items()}
    if conversion:
        plan["conversion"] = conversion
    path = incomplete / _PLAN
    if incomplete.exists() and (not path.exists() or json.loads(path.read_text()) != plan):
        _LOG.warning("%s was begun from other images and is made again", incomplete)
        shutil.rmtree(incomplete)
    incomplete.mkdir(parents=True, exist_ok=True)
    write_text_atomically(epath.Path(path), json.dumps(plan))


def _digest(images: list[Image]) -> str:
    content = hashlib.sha256("\n".join(image.name for image in images).encode())
    content.update(np.array([image.label for image in images], np.int32).tobytes())
    content.update(np.array([image.size for image in images], np.int64).tobytes())
    return content.hexdigest()


def _shards(name: str, directory: Path, split: str, images: list[Image]) -> list[_Shard]:
    """Divides a split into as many shards as TFDS would make."""
    from tensorflow_datasets.core.utils import shard_utils

    count = shard_utils.ShardConfig.calculate_number_shards(sum(image.size for image in images), len(images))
    template = _template(name, directory, split)
    return [
        _Shard(Path(template.sharded_filepath(shard_index=number, num_shards=count)), [images[row] for row in rows])
        for number, rows in enumerate(np.array_split(stored_order(len(images)), count))
    ]


def _template(name: str, directory: Path, split: str) -> Any:
    from tensorflow_datasets.core import naming

    return naming.ShardedFileTemplate(
        data_dir=epath.Path(directory), dataset_name=name, split=split, filetype_suffix="array_record"
    )


def _write_missing(shards: list[_Shard], features: Any, convert: Convert, shrinks: bool) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        done = list(pool.map(_Shard.is_done, shards))
        missing = [shard for shard, is_done in zip(shards, done, strict=True) if not is_done]
        if not missing:
            return
        size = sum(shard.size for shard in missing)
        if not shrinks:
            check_space(missing[0].path.parent, int(size * _OVERHEAD))
        _LOG.info("%d of %d shards are to be written in %s", len(missing), len(shards), missing[0].path.parent)
        progress = Progress("shards", len(missing), size)
        for shard in run_all(pool, lambda shard: shard.write(features, convert), missing):
            progress.add(shard.size)


def _write_info(info: Any, directory: Path, shards: Mapping[str, list[_Shard]]) -> None:
    """Writes dataset_info.json and features.json, by TFDS."""
    from tensorflow_datasets.core import splits

    infos = [
        splits.SplitInfo(
            name=split,
            shard_lengths=[len(shard.images) for shard in of_split],
            num_bytes=sum(shard.path.stat().st_size for shard in of_split),
            filename_template=_template(info.name, directory, split),
        )
        for split, of_split in shards.items()
    ]
    info.set_file_format("array_record", override=True)
    info.set_splits(splits.SplitDict(infos))
    info.write_to_directory(directory)
