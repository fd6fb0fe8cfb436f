"""Finds images that are no TFDS data set yet: in ImageNet's official archives, and in directories of image files."""

import contextlib
import hashlib
import logging
import os
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mae_dist import names
from mae_dist.data.decode import Decoder, UndecodableImage
from mae_dist.data.files import Progress
from mae_dist.errors import ConfigError, DataFault
from mae_dist.prepare.tfds_writer import Image

IMAGENET_COUNTS = {"train": 1_281_167, "validation": 50_000}
_IMAGENET_CLASS_COUNTS = {"train": (732, 1300), "validation": (50, 50)}  # fewest and most images of a class
_TRAIN_TAR, _VALIDATION_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_SPLITS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
_THREADS = os.cpu_count() or 1
_CHUNK = 1024  # files given to the threads at once: a tree may have millions
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


def folder_images(root: Path, skip_undecodable: bool) -> tuple[dict[str, list[Image]], list[str]]:
    """Finds the images of a tree train/<class>/*, of validation/ (or val/) and test/ if there are, and class names.

    Every file is decoded once, so that what is prepared can be trained on; after a kill all over again.

    Args:
      root: the tree's.
      skip_undecodable: leave out files that are no image, instead of refusing them.

    Raises:
      ConfigError: no such tree.
      DataFault: files that do not decode, or classes that training does not have.
    """
    folders = _split_folders(root)
    classes = _subfolders(folders["train"])
    if faults := [fault for name in classes if (fault := names.label_fault(name))]:
        raise DataFault(f"{folders['train']}: the class {'; '.join(faults[:10])}")
    splits = {}
    for split, folder in folders.items():
        found = _subfolders(folder)
        if set(found) - set(classes):
            raise DataFault(
                f"{folder} has the classes {sorted(set(found) - set(classes))[:10]}, which {folders['train']} has "
                "not; remove or rename them there, or add them to train"
            )
        splits[split] = _folder_split(folder, {name: classes.index(name) for name in found}, skip_undecodable)
    return splits, classes


def folder_contents(root: Path) -> str:
    """Describes the files of such a tree, by which a change of it is found: number and digest for each split.

    The digest is of names and sizes: no file is read.
    """
    parts = []
    for split, folder in _split_folders(root).items():
        paths = _files(folder, _subfolders(folder))
        listing = "\n".join(f"{path.relative_to(folder)} {path.stat().st_size}" for path in paths)
        digest = hashlib.sha256(os.fsencode(listing)).hexdigest()
        parts.append(f"{split} {len(paths)} files, digest {digest[:16]}")
    return "; ".join(parts)


def _split_folders(root: Path) -> dict[str, Path]:
    """Returns the folders of the splits; raises ConfigError where none is of training."""
    found = {split: [root / name for name in choices if (root / name).is_dir()] for split, choices in _SPLITS.items()}
    folders = {split: paths[0] for split, paths in found.items() if paths}
    if "train" not in folders or not _subfolders(folders["train"]):
        raise ConfigError(f"--from_folder={root} needs train/<class>/<images>, and validation/ and test/ if there are")
    return folders


def _subfolders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def _files(folder: Path, classes: Iterable[str]) -> list[Path]:
    """Returns the files in the folders of the classes, in order, without hidden ones."""
    paths = [path for name in classes for path in sorted((folder / name).rglob("*")) if path.is_file()]
    return [path for path in paths if not path.name.startswith(".")]


def _folder_split(folder: Path, labels: dict[str, int], skip_undecodable: bool) -> list[Image]:
    paths = _files(folder, labels)
    _LOG.info("decoding the %d files of %s", len(paths), folder)
    sizes = [path.stat().st_size for path in paths]
    progress, images, bad = Progress("files", len(paths), sum(sizes)), [], []
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(paths), _CHUNK):
            chunk = paths[start : start + _CHUNK]
            for path, size, decodes in zip(
                chunk, sizes[start : start + _CHUNK], pool.map(_decodes, chunk), strict=True
            ):
                inside = path.relative_to(folder)
                if fault := names.text_fault(str(inside)):
                    raise DataFault(f"the image {str(inside)!r} has {fault}: TFDS stores the name beside the image")
                if decodes:
                    images.append(Image(str(inside), labels[inside.parts[0]], str(path), 0, size))
                else:
                    bad.append(str(path))
                progress.add(size)
    if bad and not skip_undecodable:
        raise DataFault(
            f"{len(bad)} of {len(paths)} files in {folder} are no images, or corrupted: {', '.join(bad[:10])}; remove "
            "or restore them, or give --skip_undecodable to leave them out"
        )
    if bad:
        _LOG.warning("left out %d files that do not decode: %s", len(bad), ", ".join(bad[:10]))
    if not images:
        raise DataFault(f"{folder} holds no image in its folders")
    return images


def _decodes(path: Path) -> bool:
    with contextlib.suppress(UndecodableImage, OSError):
        Decoder(3).decode(path.read_bytes())
        return True
    return False
