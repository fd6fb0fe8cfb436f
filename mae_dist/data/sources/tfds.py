"""Image classification datasets prepared by TFDS as array_record files, read without TensorFlow.

Legend: N examples asked for, H height, W width, C channels.
"""

import contextlib
import json
import resource
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mae_dist.data.dataset import Dataset, check_labels, digest
from mae_dist.data.sources.staging import Staging
from mae_dist.data.transforms import (
    PHOTOGRAPH_FROM,
    RandomCrops,
    UndecodableImage,
    center_box,
    decode_box,
    decode_image,
    header_size,
)
from mae_dist.errors import ConfigError, DataFault
from mae_dist.storage import absolute_name

_OPEN_THREADS = 16
_READ_RECORDS = 32  # held at a time, as files: those of a whole batch are as large as the batch
_EVALUATION_ZOOM = 256 / 224  # resize the short side to 256, crop 224: ImageNet's usual evaluation
# Parts of the fingerprint: raise one when decoding changes what an example shows, and runs must not go on over that. A
# better resampling, a few grey levels here and there, is not that.
_DECODE_RULES = 1  # of small images, which have nothing to spare at the border either
_DECODE_RULES_PHOTOGRAPHS = 2  # of those that are resized to PHOTOGRAPH_FROM pixels or more


class Shard(NamedTuple):
    """Records skip .. skip + take - 1 of one array_record file."""

    filename: str
    skip: int
    take: int


class TfdsDataset(Dataset):
    """Decodes records on demand.

    Attributes:
      native_size: (height, width) if all images have one size.
      shards: which records of which files, in order.
      crops_evaluation: whether evaluation sees the middle of an image where training without random crops sees all.
    """

    in_memory = False

    def __init__(
        self,
        *,
        title: str,
        identity: dict[str, Any],
        shards: list[Shard],
        native_size: tuple[int, int] | None,
        image_size: tuple[int, int],
        channels: int,
        class_names: tuple[str, ...],
    ):
        self.title = title
        self.identity = identity
        self.shards = shards
        self.native_size = native_size
        self.image_size = image_size
        self.channels = channels
        self.class_names = class_names
        self.num_classes = len(class_names)
        self.num_examples = sum(shard.take for shard in shards)
        self.fingerprint = digest(identity)
        self.crops_evaluation = _are_photographs(image_size, native_size)
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

    def record_name(self, index: int) -> str:
        position = index
        for shard in self.shards:
            if position < shard.take:
                return f"{self.title} example {index} (record {shard.skip + position} of {shard.filename})"
            position -= shard.take
        raise AssertionError(f"example {index} of {self.num_examples}")

    def read(
        self, indices: np.ndarray, crops: RandomCrops | None = None, evaluation: bool = True
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        indices = np.asarray(indices)
        images = np.zeros((len(indices), *self.image_size, self.channels), np.uint8)
        labels = np.zeros(len(indices), np.int32)
        bad = np.zeros(len(indices), bool)
        zoom = _EVALUATION_ZOOM if evaluation and self.crops_evaluation else 1.0
        for start in range(0, len(indices), _READ_RECORDS):
            rows = np.arange(start, min(start + _READ_RECORDS, len(indices)))
            files, labels[rows], sizes = self._read_files(indices[rows])
            check_labels(labels[rows], self.num_classes, lambda row, at=start: self.record_name(int(indices[at + row])))
            if crops is None:
                boxes = [center_box(h or 1, w or 1, self.image_size, zoom) for h, w in sizes.tolist()]
            else:
                boxes = crops.take(rows).boxes(*np.maximum(sizes, 1).T).tolist()
            for row, data, box in zip(rows, files, boxes, strict=True):
                try:
                    if data is None:
                        raise UndecodableImage("no image")
                    decode_box(data, box, images[row], margin=crops is None)  # one at a time, into its place
                except UndecodableImage:
                    bad[row] = True
        return {"image": images, "label": labels}, bad

    def _read_files(self, indices: np.ndarray) -> tuple[list[bytes | None], np.ndarray, np.ndarray]:
        """The images' files, None where there is none to decode, labels, and sizes (0 there). # (n,), (n,), (n, 2)"""
        files: list[bytes | None] = []
        labels = np.zeros(len(indices), np.int32)
        sizes = np.zeros((len(indices), 2), np.int64)
        for row, record in enumerate(self._read_records(indices)):
            data, labels[row] = _parse(record)
            size = None if data is None else _size(data)
            files.append(data if size else None)
            sizes[row] = size or 0
        return files, labels, sizes

    def _read_records(self, indices: np.ndarray) -> list[bytes | None]:
        """Record bytes, None where the file is damaged there (array_record keeps a hash of every chunk)."""
        keys = [int(index) for index in indices]
        try:
            return list(self._records.__getitems__(keys))
        except RuntimeError:
            return [self._read_record(key) for key in keys]

    def _read_record(self, key: int) -> bytes | None:
        try:
            return self._records[key]
        except RuntimeError as error:
            if "data hash mismatch" in str(error):
                return None
            raise DataFault(
                f"{self.record_name(key)} cannot be read: {error}; restore the file, or delete its directory and "
                "prepare the data set again"
            ) from error


def _are_photographs(image_size: tuple[int, int], native_size: tuple[int, int] | None) -> bool:
    return min(image_size) >= PHOTOGRAPH_FROM and native_size != image_size


def _parse(record: bytes | None) -> tuple[bytes | None, int]:
    """The image's file, or None if the record has none, and the label."""
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2  # bytes to fields; no TensorFlow in it

    if record is None:
        return None, 0
    # Parsed here because TFDS's general deserializer, for features of any kind, takes five times as long.
    try:
        example = tf_example_pb2.Example.FromString(record)  # pyright: ignore[reportAttributeAccessIssue]
        features = example.features.feature
        return features["image"].bytes_list.value[0], features["label"].int64_list.value[0]
    except (DecodeError, IndexError):  # no Example, or one without image and label
        return None, 0


def _size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of an image, by decoding it if the header does not tell; None if it cannot be decoded."""
    size = header_size(data)
    if size is None:
        with contextlib.suppress(UndecodableImage):
            size = decode_image(data, 1).shape[:2]
    return size


def open_tfds(
    name: str,
    split: str,
    data_dir: str,
    *,
    image_size: tuple[int, int],
    channels: int,
    staging: Staging | None = None,
) -> TfdsDataset:
    """Opens a TFDS dataset whose features have an "image" and a "label", preparing it first if need be.

    Args:
      name: as TFDS writes it, e.g. "cifar10", "imagenet2012", "imagenet_resized/64x64:0.1.0".
      split: a TFDS split expression.
      data_dir: TFDS data directory; "" is TFDS's default.
      image_size: (height, width) of the images given out.
      channels: 1 grey, 3 RGB, 4 RGBA.
      staging: copies what the split needs first, and is then read instead of data_dir.

    Raises:
      ConfigError: no such dataset or split, or features that do not fit.
      DataFault: it is not prepared and cannot be, or its files are missing or damaged.
    """
    if staging is not None:
        staging.copy_info(name)
        data_dir = str(staging.data_dir)
    builder = _open_builder(name, data_dir)
    native_size, class_names = _check_features(builder, channels)
    try:
        instructions = builder.info.splits[split].file_instructions
    except (KeyError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"split {split!r} of {name}: {error}; its splits are {', '.join(map(repr, builder.info.splits))}, "
            "with an optional slice such as train[:80%]"
        ) from error
    if not sum(i.take for i in instructions):
        raise ConfigError(f"split {split!r} of {name} selects no example; write a larger slice")
    if staging is not None:
        staging.copy_records([Path(i.filename) for i in instructions])
    _check_files(instructions)
    full_name = f"{builder.info.full_name}"
    identity = {
        "source": "tfds",
        "name": full_name,
        "split": split,
        "count": sum(i.take for i in instructions),
        "image_size": image_size,
        "channels": channels,
        "decode_rules": _DECODE_RULES_PHOTOGRAPHS if _are_photographs(image_size, native_size) else _DECODE_RULES,
    }
    return TfdsDataset(
        title=f"{full_name} split {split!r}",
        identity=identity,
        shards=[Shard(str(i.filename), i.skip, i.take) for i in instructions],
        native_size=native_size,
        image_size=image_size,
        channels=channels,
        class_names=class_names,
    )


def is_prepared(name: str, data_dir: str) -> bool:
    """Whether TFDS finds a data set on this machine, prepared: nothing is fetched to tell.

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
        raise ConfigError(
            f"TFDS has no dataset {name!r} ({_first_line(error)}) and {data_dir or 'its default directory'} holds "
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
        # A fresh one: a builder knows its files from when it is made.
        builder = _find_builder(name, data_dir)
    file_format = builder.info.file_format
    if file_format is None or file_format.value != "array_record":
        ours = builder.name in (*cifar.BUILDERS, "imagenet2012")
        again = (
            f"python -m mae_dist.prepare {builder.name} --data_dir=<another>"
            if ours
            else f"tfds build {name} --file_format=array_record --data_dir=<another> (needs the extra `tensorflow`)"
        )
        raise DataFault(
            f"{builder.data_path} holds {file_format.value if file_format else 'unknown'} files, which cannot be read "
            f"at random; prepare array_record files and set data.data_dir to where they are: {again}"
        )
    return builder


def _check_features(builder: Any, channels: int) -> tuple[tuple[int, int] | None, tuple[str, ...]]:
    """The images' common size, if there is one, and the class names."""
    import tensorflow_datasets as tfds

    features = dict(builder.info.features.items())
    image: Any = features.get("image")
    label: Any = features.get("label")
    if not issubclass(type(image), tfds.features.Image) or not issubclass(type(label), tfds.features.ClassLabel):
        raise ConfigError(
            f"{builder.name} has the features {list(features)}; image classification needs an 'image' of type Image "
            "and a 'label' of type ClassLabel"
        )
    if image.np_dtype != np.uint8:
        raise ConfigError(f"{builder.name} has images of {np.dtype(image.np_dtype)}; only uint8 images are supported")
    if channels not in (1, 3, 4) or (channels == 4 and image.shape[-1] not in (4, None)):
        raise ConfigError(
            f"model.channels={channels}, and the images of {builder.name} have {image.shape[-1]}; "
            "it must be 1 (grey) or 3 (RGB), or 4 where the images have an alpha channel"
        )
    height, width = image.shape[:2]
    names = label.names or [str(number) for number in range(label.num_classes or 0)]
    return (None if height is None or width is None else (height, width)), tuple(names)


def _check_files(instructions: list[Any]) -> None:
    """Opens every file once, so that a missing or cut one is found at start and not hours later."""
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

    def problem(instruction: Any) -> str | None:
        path = Path(instruction.filename)
        if not path.exists():
            return f"{path} is missing"
        try:
            reader = array_record_module.ArrayRecordReader(str(path))
            count = reader.num_records()
            reader.close()
        except RuntimeError as error:
            return f"{path} ({path.stat().st_size} bytes) is truncated or damaged: {error}"
        if count != instruction.examples_in_shard:
            return f"{path} holds {count} records where dataset_info.json says {instruction.examples_in_shard}"
        return None

    with ThreadPoolExecutor(_OPEN_THREADS) as pool:
        problems = [found for found in pool.map(problem, instructions) if found]
    if problems:
        raise DataFault(
            f"{len(problems)} of {len(instructions)} record files cannot be used: {'; '.join(problems[:5])}. "
            f"Restore them, or delete {Path(instructions[0].filename).parent} and prepare the data set again"
        )


def _allow_open_files(count: int) -> None:
    """One reader stays open per file, and ImageNet's 1,024 files alone reach the usual soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
