"""Images of a user's own as a trained model takes them: arrays, or files by name.

Shapes: B images, H W C image.
"""

import os
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeGuard

import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict
from numpy.typing import ArrayLike

from mae_dist.config.default import get_config as default_config
from mae_dist.data import ArrayDataset, Dataset
from mae_dist.data.decode import Decoder
from mae_dist.data.sources import listing as listings
from mae_dist.data.sources.folder import open_in_order
from mae_dist.data.sources.listing import LeftOut, Listing
from mae_dist.errors import ConfigError, DataFault

Paths = Sequence[str | os.PathLike[str]]
_CHUNK = 64  # images that a thread decodes at a time

HELP = (
    "Images of your own, instead of the config's: a directory, files, or several of these, separated by commas; a "
    "quoted glob; or a text file with a path in each line."
)


def find_images(images: str | os.PathLike[str]) -> list[str]:
    """Returns the paths of the image files that `images` names, in the order of their names.

    Args:
      images: a directory, which is searched to any depth; a file; several of these, separated by commas; a glob; or a
        text file with a path in each line.

    Raises:
      ConfigError: a bucket, or a glob that matches nothing.
      DataFault: something is not there or cannot be read, or there is no image.
    """
    listing = listings.find_images(os.fspath(images), "images")
    return [os.fsdecode(os.path.join(listing.root, name)) for name in listing.names]


def find_broken(images: Paths, channels: int = 3) -> dict[str, str]:
    """Decodes every file once; returns those that do not decode, each path with the reason.

    Args:
      images: a list of paths, as from `find_images`.
      channels: of the model that is to see them.

    Raises:
      ConfigError: one path instead of a list.
      DataFault: a file does not exist, or of a sample of the files none decodes.
    """
    config = default_config()
    config.model.channels = channels
    dataset = _open_paths(images, config)
    chunks = [np.arange(start, min(start + _CHUNK, len(images))) for start in range(0, len(images), _CHUNK)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases Python's lock
        bad = [rows[fails] for rows, (_, fails) in zip(chunks, pool.map(dataset.read, chunks), strict=True)]
    return {os.fspath(images[row]): _reason(dataset, row) for rows in bad for row in rows.tolist()}


def read_images(images: Paths, image_size: tuple[int, int], channels: int = 3) -> np.ndarray:
    """Reads image files: upright, the centre cropped to the shape of `image_size`, then resized to it.

    Args:
      images: a list of paths, as from `find_images`.
      image_size: (height, width) in pixels.
      channels: C; 1 gray, 3 RGB, 4 RGBA.

    Returns:
      uint8 (B, H, W, C).

    Raises:
      ConfigError: one path instead of a list.
      DataFault: files that do not exist or do not decode; it names them.
    """
    config = default_config()
    config.model.update(image_size=image_size, channels=channels)
    dataset = _open_paths(images, config)
    return dataset.examples(np.arange(dataset.num_examples))["image"]


def _open_paths(images: Paths, config: ConfigDict) -> Dataset:
    if not are_paths(images):
        raise ConfigError("images: give a list of at least one path, as mae_dist.find_images(directory) returns it")
    return open_given(images, config)


def _reason(dataset: Dataset, number: int) -> str:
    """Returns why an image does not decode, without its name."""
    return dataset.fault(number).removeprefix(dataset.record_name(number)).strip(" ()")


def open_images(images: str, config: ConfigDict) -> Dataset:
    """Opens the images that --images names, for the model of `config`, in the order of their names.

    Those that do not decode are passed over; see `report_skipped`.

    Raises:
      ConfigError, DataFault: as `find_images`; or of a sample of the files none decodes.
    """
    listing = listings.find_images(images, "--images")
    if str(listing.left_out):
        logging.warning("%s", listing.left_out)
    return _open(listing, config)


def open_given(images: ArrayLike | Paths, config: ConfigDict) -> Dataset:
    """Opens arrays, or files by their paths, in the order given. Those that do not decode are passed over.

    Raises:
      ConfigError: one path instead of a list of them.
      DataFault: as `check_images`; a file does not exist, or of a sample of the files none decodes.
    """
    if are_paths(images):
        paths = [os.fsencode(os.path.abspath(os.path.expanduser(path))) for path in images]
        if missing := [os.fsdecode(path) for path in paths if not os.path.isfile(path)]:
            raise DataFault(f"{len(missing)} of {len(paths)} files do not exist: {', '.join(missing[:10])}")
        unknown = np.zeros(len(paths), np.int64)
        return _open(Listing(b"/", [path.removeprefix(b"/") for path in paths], unknown, unknown, LeftOut()), config)
    array = check_images(np.asarray(images), (*config.model.image_size, config.model.channels), config.data.dtype)
    return ArrayDataset({"image": array, "label": np.full(len(array), -1, np.int32)}, num_classes=0)


def are_paths(images: ArrayLike | Paths) -> TypeGuard[Paths]:
    """True for a sequence of paths; raises `ConfigError` for a single one."""
    if isinstance(images, str | os.PathLike):
        raise ConfigError(
            f"images={os.fspath(images)!r} is one path; give a list of them: [path], or those of a directory: "
            "mae_dist.find_images(directory)"
        )
    if isinstance(images, np.ndarray):
        return images.dtype.kind == "U" and images.ndim == 1
    return isinstance(images, Sequence) and bool(images) and isinstance(images[0], str | os.PathLike)


def _open(listing: Listing, config: ConfigDict) -> Dataset:
    model, data = config.model, config.data
    dtype = "uint8" if data.dtype == "auto" else data.dtype
    decoder = Decoder(model.channels, dtype, data.max_value, data.background, exif=True, max_pixels=data.max_pixels)
    dataset = open_in_order(listing, tuple(model.image_size), decoder)
    dataset.reported = frozenset(range(dataset.num_examples))  # by `report_skipped`, or an exception, once
    return dataset


def missing(dataset: Dataset, found: Iterable[int]) -> list[int]:
    """Returns the numbers of the images that are not among those `found`."""
    return sorted(set(range(dataset.num_examples)) - set(found))


def report_skipped(dataset: Dataset, found: Collection[int]) -> None:
    """Logs the names of the images that are not among the numbers `found`; raises `DataFault` if these are none."""
    numbers = missing(dataset, found)
    if not len(found):
        faults = "; ".join(map(dataset.fault, numbers[:10]))
        raise DataFault(f"of {dataset.num_examples} images none decodes: {faults}")
    if numbers:
        faults = "\n  ".join(map(dataset.fault, numbers))
        logging.warning("skipped %d of %d files:\n  %s", len(numbers), dataset.num_examples, faults)


def check_images(images: np.ndarray, expected: tuple[int, ...], dtype: str) -> np.ndarray:
    """Returns the images, floating-point ones as float32; raises a `DataFault` for what a model cannot take.

    Args:
      images: uint8 in 0..255 or floating-point in 0..1; also uint16 for a model that was trained on such.
      expected: (H, W, C) of the model.
      dtype: `data.dtype` of the model; "auto" is uint8.
    """
    if images.ndim != 4 or images.shape[1:] != expected:
        raise DataFault(
            f"images have shape {images.shape}, needed: (B, {', '.join(map(str, expected))}); resize them first, "
            "or convert the encoder to their size"
        )
    if images.dtype == np.uint8 or images.dtype == dtype == "uint16":
        return images
    if not jnp.issubdtype(images.dtype, jnp.floating):  # bfloat16 is of JAX's, not of NumPy's types
        needed = "uint8 in 0..255" if dtype in ("auto", "uint8") else dtype
        raise DataFault(f"images are {images.dtype}; needed: {needed} or floating-point in 0..1")
    # A little beyond is what resizing leaves; 0..255 in floats, or pixels normalised already, is not.
    if dtype != "float32" and images.size and not (images.min() >= -0.1 and images.max() <= 1.1):
        raise DataFault(
            f"floating-point images reach from {images.min():g} to {images.max():g}; needed: 0..1, not normalised"
        )
    return images.astype(np.float32)
