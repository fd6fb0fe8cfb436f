"""Image classification data sets that TFDS prepared as array_record files, read without TensorFlow."""

import io
import json
import os
import resource
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mae_dist.data.dataset import Dataset
from mae_dist.data.decode import Decoder
from mae_dist.data.image_files import DTYPES, MAX_PIXELS
from mae_dist.data.sources import register_source
from mae_dist.data.sources.cache import cache_root, cached
from mae_dist.data.sources.encoded import EncodedDataset
from mae_dist.data.sources.staging import Staging
from mae_dist.errors import ConfigError, DataFault
from mae_dist.storage import absolute_name

_THREADS = 16  # that open files


class Shard(NamedTuple):
    """Records skip .. skip + take - 1 of one array_record file."""

    filename: str
    skip: int
    take: int


class TfdsDataset(EncodedDataset):
    """Reads records of array_record files.

    Attributes:
      shards: which records of which files, in order.
    """

    def __init__(self, shards: list[Shard], array: tuple[tuple[int, ...], str] | None = None, **description: Any):
        """Opens the files; `array` is shape and type of images stored as numbers, the rest for `EncodedDataset`."""
        super().__init__(num_examples=sum(shard.take for shard in shards), **description)
        self.shards, self._array = shards, array
        self._open_records()

    def _open_records(self) -> None:
        from array_record.python import array_record_data_source

        _allow_open_files(len(self.shards))
        spans = [f"{shard.filename}[{shard.skip}:{shard.skip + shard.take}]" for shard in self.shards]
        self._records = array_record_data_source.ArrayRecordDataSource(spans)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_records"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open_records()

    @property
    def stats(self) -> list[Any]:
        files = sorted({shard.filename for shard in self.shards})
        return [(Path(name).name, os.stat(name).st_size, os.stat(name).st_mtime_ns) for name in files]

    def record_name(self, index: int) -> str:
        position = index
        for shard in self.shards:
            if position < shard.take:
                return f"{self.title} example {index} (record {shard.skip + position} of {shard.filename})"
            position -= shard.take
        raise AssertionError(f"example {index} of {self.num_examples}")

    def encoded(self, indices: np.ndarray) -> tuple[list[bytes | None], np.ndarray]:
        keys = indices.tolist()
        try:
            records = list(self._records.__getitems__(keys))
        except RuntimeError:  # of one of them
            records = [self._read_record(key) for key in keys]
        images, labels, _ = zip(*(_parse(record, self._array) for record in records), strict=True)
        return list(images), np.array(labels if self.num_classes else [-1] * len(labels), np.int32)

    def file_name(self, index: int) -> str:
        return _parse(self._read_record(index), self._array)[2]

    def _read_record(self, key: int) -> bytes | None:
        """Returns a record, None where the file is corrupted: array_record keeps a hash of every chunk."""
        try:
            return self._records[key]
        except RuntimeError as error:
            if "data hash mismatch" in str(error):
                return None
            raise DataFault(
                f"{self.record_name(key)} cannot be read: {error}; restore the file, or delete its directory and "
                "prepare the data set again"
            ) from error


def _parse(record: bytes | None, array: tuple[tuple[int, ...], str] | None) -> tuple[bytes | None, int, str]:
    """Returns the image's file, None if the record has none, the label, -1 without one, and the file's name."""
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2  # bytes to fields; no TensorFlow in it

    if record is None:
        return None, -1, ""
    # Parsed here because TFDS's general deserializer, for features of any kind, takes five times as long.
    try:
        example = tf_example_pb2.Example.FromString(record)  # pyright: ignore[reportAttributeAccessIssue]
    except DecodeError:
        return None, -1, ""
    features = example.features.feature
    image, label, name = (features[key] if key in features else None for key in ("image", "label", "file_name"))  # noqa: SIM401
    content = None
    if image is not None and array is not None:
        values = image.float_list.value or image.int64_list.value
        file = io.BytesIO()
        np.save(file, np.array(values, array[1]).reshape(array[0]))
        content = file.getvalue()
    elif image is not None and image.bytes_list.value:
        content = image.bytes_list.value[0]
    number = label.int64_list.value[0] if label is not None and label.int64_list.value else -1
    stored = name.bytes_list.value[0] if name is not None and name.bytes_list.value else b""
    return content, number, stored.decode(errors="replace")


@register_source("tfds")
def open_tfds(
    split: str,
    *,
    name: str,
    data_dir: str,
    image_size: tuple[int, int],
    channels: int,
    cache: str,
    cache_dir: str,
    stage: bool,
    max_bad_share: float,
    dtype: str = "auto",
    max_value: float = 0.0,
    max_pixels: int = MAX_PIXELS,
) -> Dataset:
    """Opens a TFDS dataset whose features have an "image", and a "label" or none, preparing it first if need be.

    Args:
      split: a TFDS split expression.
      name: as TFDS writes it, e.g. "cifar10", "imagenet2012", "imagenet_resized/64x64:0.1.0".
      data_dir: TFDS data directory, may be gs://…; "" is TFDS's default.
      image_size: (height, width) of the images given out; and their `channels`.
      dtype: of the images given out; "auto" is the type of those stored.
      max_value: as for `Decoder`, like max_pixels.
      cache: as for `cached`, like max_bad_share.
      cache_dir: where decoded images and copied record files are kept for the next start; "" is ~/.cache/mae_dist.
      stage: true to copy the record files that the split needs there; those in a bucket always are.

    Raises:
      ConfigError: no such dataset or split, or features that do not fit.
      DataFault: it is not prepared and cannot be, or its files are missing or corrupted.
    """
    if stage and not data_dir:
        raise ConfigError(
            "data.stage copies data.data_dir, which is empty; name the directory or bucket that is to be copied"
        )
    staging = Staging(data_dir, cache_root(cache_dir)) if stage or "://" in data_dir else None
    if staging is not None:
        staging.copy_info(name)
        data_dir = str(staging.data_dir)
    builder = _open_builder(name, data_dir)
    features = _check_features(builder, channels)
    instructions = _file_instructions(builder, name, split)
    if staging is not None:
        staging.copy_records([Path(i.filename) for i in instructions])
    _check_files(instructions)
    full_name = builder.info.full_name
    dataset = TfdsDataset(
        [Shard(str(i.filename), i.skip, i.take) for i in instructions],
        features.array,
        title=f"{full_name} split {split!r}",
        identity={"source": "tfds", "name": full_name, "split": split},
        image_size=image_size,
        decoder=Decoder(channels, features.dtype if dtype == "auto" else dtype, max_value, max_pixels=max_pixels),
        native_size=features.native_size,
        class_names=features.class_names,
    )
    return cached(dataset, cache=cache, cache_dir=cache_dir, max_bad_share=max_bad_share)


def _file_instructions(builder: Any, name: str, split: str) -> list[Any]:
    """Returns which records of which files a split expression selects."""
    try:
        instructions = builder.info.splits[split].file_instructions
    except (KeyError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"split {split!r} of {name}: {error}; its splits are {', '.join(map(repr, builder.info.splits))}, "
            "with an optional slice such as train[:80%]"
        ) from error
    if not sum(i.take for i in instructions):
        raise ConfigError(f"split {split!r} of {name} selects no example; write a larger slice")
    return instructions


def is_prepared(name: str, data_dir: str) -> bool:
    """True if TFDS finds a data set on this machine, prepared; fetches nothing.

    Raises:
      DataFault: it is there and cannot be opened.
    """
    try:
        return "://" not in data_dir and _find_builder(name, data_dir).is_prepared()
    except ConfigError:
        return False


def _find_builder(name: str, data_dir: str) -> Any:
    import tensorflow_datasets as tfds

    root = absolute_name(data_dir) if data_dir else None
    try:
        return tfds.builder(name, data_dir=root, try_gcs=False)
    except (tfds.core.DatasetNotFoundError, AssertionError, ValueError) as error:
        if root and (Path(root) / "dataset_info.json").exists():
            raise ConfigError(
                f"data.data_dir={data_dir} is a data set itself; name the directory above name and version, as "
                f"--config.data.data_dir={shlex.quote(str(Path(root).parent.parent))}"
            ) from error
        first_line = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"TFDS has no dataset {name!r} ({first_line}) and {data_dir or 'its default directory'} holds "
            "none: names are listed at https://www.tensorflow.org/datasets/catalog; for a set that was prepared "
            "elsewhere give data.data_dir"
        ) from error
    except (json.JSONDecodeError, OSError) as error:
        raise DataFault(f"TFDS cannot open {name!r} in {data_dir or 'its default directory'}: {error}") from error


def _open_builder(name: str, data_dir: str) -> Any:
    from mae_dist.data.sources import cifar

    builder = _find_builder(name, data_dir)
    if not builder.is_prepared():
        if builder.name == "imagenet2012":
            raise DataFault(
                f"{builder.data_path} is not prepared: python -m mae_dist.prepare imagenet2012 "
                f"--data_dir={shlex.quote(str(builder.data_dir_root))} --manual_dir=<where its archives are>"
            )
        if builder.name in cifar.BUILDERS:
            builder = cifar.BUILDERS[builder.name](data_dir=builder.data_dir_root)
        cifar.prepare(builder)
        builder = _find_builder(name, data_dir)  # a builder looks for its files only when it is made
    file_format = builder.info.file_format.value if builder.info.file_format else "unknown"
    if file_format != "array_record":
        again = (
            f"python -m mae_dist.prepare {builder.name} --data_dir=<another>"
            if builder.name in (*cifar.BUILDERS, "imagenet2012")
            else f"tfds build {name} --file_format=array_record --data_dir=<another> (needs the extra `tensorflow`)"
        )
        raise DataFault(
            f"{builder.data_path} holds {file_format} files, which cannot be read at random; prepare array_record ones "
            f"and set data.data_dir to where they are: {again}"
        )
    return builder


class _Features(NamedTuple):
    native_size: tuple[int, int] | None  # of all images, if they have one
    class_names: tuple[str, ...]  # () without labels
    dtype: str
    array: tuple[tuple[int, ...], str] | None  # shape and type of images that are stored as numbers, not as files


def _check_features(builder: Any, channels: int) -> _Features:
    """Returns what the features of a data set say of its images and labels."""
    import tensorflow_datasets as tfds

    features = dict(builder.info.features.items())
    image: Any = features.get("image")
    label: Any = features.get("label")
    is_file = issubclass(type(image), tfds.features.Image)
    if not is_file and not (issubclass(type(image), tfds.features.Tensor) and len(image.shape) == 3):
        raise ConfigError(
            f"{builder.name} has the features {list(features)}; needed is an 'image' of type Image, or a Tensor of "
            "shape (height, width, channels)"
        )
    dtype = str(np.dtype(image.np_dtype))
    if dtype not in (DTYPES if not is_file else ("uint8", "uint16")):
        raise ConfigError(f"{builder.name} has images of {dtype}; needed: uint8 or uint16, as a Tensor also float32")
    if channels not in (1, 3) and image.shape[-1] not in (channels, None):
        raise ConfigError(
            f"model.channels={channels}, and the images of {builder.name} have {image.shape[-1]}; use that, or for "
            "images of 1 or 3 channels 1 (grey) or 3 (RGB)"
        )
    names: list[str] = []
    if issubclass(type(label), tfds.features.ClassLabel):
        names = label.names or [str(number) for number in range(label.num_classes or 0)]
    size = None if None in image.shape[:2] else image.shape[:2]
    return _Features(size, tuple(names), dtype, None if is_file else (image.shape, dtype))


def num_records(path: Path) -> int:
    """Returns how many records an array_record file holds; raises RuntimeError if it is truncated or corrupted."""
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

    reader = array_record_module.ArrayRecordReader(str(path))
    count = reader.num_records()
    reader.close()
    return count


def _check_files(instructions: list[Any]) -> None:
    """Opens every file once, so that a missing or truncated one is found at start and not hours later."""

    def problem(instruction: Any) -> str | None:
        path = Path(instruction.filename)
        if not path.exists():
            return f"{path} is missing"
        try:
            count = num_records(path)
        except RuntimeError as error:
            return f"{path} ({path.stat().st_size} bytes) is truncated or corrupted: {error}"
        if count != instruction.examples_in_shard:
            return f"{path} holds {count} records where dataset_info.json says {instruction.examples_in_shard}"
        return None

    with ThreadPoolExecutor(_THREADS) as pool:
        problems = [found for found in pool.map(problem, instructions) if found]
    if problems:
        raise DataFault(
            f"{len(problems)} of {len(instructions)} record files cannot be used: {'; '.join(problems[:5])}. "
            f"Restore them, or delete {Path(instructions[0].filename).parent} and prepare the data set again"
        )


def _allow_open_files(count: int) -> None:
    """Raises the soft limit: a reader stays open per file, and ImageNet's 1,024 reach the usual one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = count + 1024 if hard == resource.RLIM_INFINITY else min(count + 1024, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
