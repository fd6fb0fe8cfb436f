"""Finds the images in ImageNet's official archives."""

import logging
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mae_dist.data.decode import Decoder
from mae_dist.data.image_files import UndecodableImage
from mae_dist.errors import DataFault
from mae_dist.prepare.tfds_writer import Image

IMAGENET_COUNTS = {"train": 1_281_167, "validation": 50_000}
_IMAGENET_CLASS_COUNTS = {"train": (732, 1300), "validation": (50, 50)}  # fewest and most images of a class
_TRAIN_TAR, _VALIDATION_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_LOG = logging.getLogger(__name__)


def _members(file: Any, archive: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yields the files in an open archive; raises DataFault where it is none, or ends too early."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    yield tar, member
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataFault(f"{archive} is no tar archive, or corrupted ({error}); download it again") from error


def imagenet_images(manual_dir: Path, allow_incomplete: bool) -> dict[str, list[Image]]:
    """Finds the labelled images of ILSVRC 2012 in its two archives.

    Args:
      manual_dir: holds ILSVRC2012_img_train.tar, an archive of an archive per class, and ILSVRC2012_img_val.tar.
      allow_incomplete: whether there may be fewer images than there are of ImageNet.

    Raises:
      DataFault: an archive is missing or corrupted, or holds other images than ImageNet has.
    """
    import tensorflow_datasets as tfds

    paths = {"train": manual_dir / _TRAIN_TAR, "validation": manual_dir / _VALIDATION_TAR}
    missing = [str(path) for path in paths.values() if not path.is_file()]
    if missing:
        raise DataFault(
            f"missing: {', '.join(missing)}; ImageNet's archives come from https://image-net.org/download-images after "
            "registration: put both into --manual_dir"
        )
    shipped = Path(tfds.core.tfds_path("datasets/imagenet2012"))  # TFDS has the names of classes and the true labels
    numbers = {name: number for number, name in enumerate((shipped / "labels.txt").read_text().split())}
    labels = (shipped / "validation_labels.txt").read_text().split()
    splits = {
        "train": _train_images(paths["train"], numbers),
        "validation": _validation_images(paths["validation"], [numbers[name] for name in labels]),
    }
    for split, images in splits.items():
        _check_counts(split, images, paths[split], allow_incomplete)
    return splits


def _train_images(path: Path, numbers: dict[str, int]) -> list[Image]:
    _LOG.info("looking through %s", path)
    found = []
    with open(path, "rb") as file:
        for tar, member in _members(file, str(path)):
            synset = Path(member.name).stem
            if synset not in numbers:
                raise DataFault(f"{path} holds {member.name}, which is no class of ILSVRC 2012; it is another archive")
            for _, image in _members(tar.extractfile(member), f"{path}, {member.name}"):
                offset = member.offset_data + image.offset_data
                found.append(Image(os.path.basename(image.name), numbers[synset], str(path), offset, image.size))
    return _checked(path, found)


def _validation_images(path: Path, labels: list[int]) -> list[Image]:
    """Finds the images, whose names end in the numbers of their `labels`."""
    _LOG.info("looking through %s", path)
    found = []
    with open(path, "rb") as file:
        for _, member in _members(file, str(path)):
            name = os.path.basename(member.name)
            number = Path(name).stem.removeprefix("ILSVRC2012_val_")
            if not (number.isdecimal() and 1 <= int(number) <= len(labels)):
                raise DataFault(f"{path} holds {name} where ILSVRC2012_val_00000001.JPEG … were expected")
            found.append(Image(name, labels[int(number) - 1], str(path), member.offset_data, member.size))
    return _checked(path, found)


def _checked(path: Path, found: list[Image]) -> list[Image]:
    """Returns the images of an archive by name."""
    end = max((image.offset + image.size for image in found), default=0)
    if len({image.name for image in found}) != len(found) or end > path.stat().st_size:
        raise DataFault(f"{path} is corrupted: it ends within an image, or names one twice; download it again")
    return sorted(found)


def _check_counts(split: str, images: list[Image], path: Path, allow_incomplete: bool) -> None:
    total, (fewest, most) = IMAGENET_COUNTS[split], _IMAGENET_CLASS_COUNTS[split]
    counts = np.bincount([image.label for image in images], minlength=1000)
    whole = len(images) == total and counts.min() >= fewest and counts.max() <= most
    if not images or not (whole or allow_incomplete):
        raise DataFault(
            f"{path} holds {len(images)} images of {np.count_nonzero(counts)} classes with {counts.min()} to "
            f"{counts.max()} each, where ImageNet has {total} of 1000 with {fewest} to {most} each; download it again, "
            "or give --allow_incomplete if that is meant"
        )


def to_rgb_jpeg(name: str, data: bytes) -> bytes:
    """Converts the 22 images in CMYK and the one PNG, as TFDS does: any reader then has the right colours."""
    from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder as tfds_imagenet

    if name not in (*tfds_imagenet.CMYK_IMAGES, *tfds_imagenet.PNG_IMAGES):
        return data
    try:
        image = Decoder(3).decode(data)
    except UndecodableImage as error:
        raise DataFault(f"{name} does not decode: {error}; download the archive again") from error
    return cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()
