"""Examines the images of a folder, and says how a data set stores each.

Legend: H height, W width, C channels.
"""

import dataclasses
import io
import itertools
import logging
import os
import shlex
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import cv2
import numpy as np
import PIL.Image

from mae_dist import names
from mae_dist.data.decode import Decoder
from mae_dist.data.files import Progress
from mae_dist.data.image_files import DTYPES, JPEG, MAX_PIXELS, NPY, PNG, UndecodableImage, load_upright
from mae_dist.data.resample import resize_box
from mae_dist.data.sources.listing import readable
from mae_dist.errors import ConfigError, DataFault
from mae_dist.prepare.folders import Folder
from mae_dist.prepare.tfds_writer import Image

_THREADS = os.cpu_count() or 1
_CHUNK = 1024  # files given to the threads at once: a tree may have millions
_UPRIGHT_QUALITY = 95  # of JPEGs that are turned, not shrunk
_LOG = logging.getLogger(__name__)


class _Kind(NamedTuple):
    """The content of a file, upright."""

    dtype: str
    shape: tuple[int, int, int]  # (H, W, C)
    is_array: bool  # no image file of TFDS holds it
    is_turned: bool  # by its EXIF orientation


@dataclasses.dataclass(frozen=True)
class Storage:
    """How a data set stores the images of a folder; a function of the name and content of each.

    Attributes:
      dtype: of the values.
      channels: of the feature.
      size: (H, W) of all, for arrays.
      short_side: to which images are shrunk; 0: none is.
      quality: of JPEGs that are shrunk.
      max_pixels: of an image.
      num_turned: images that have to be turned by their EXIF orientation.
    """

    dtype: str
    channels: int
    size: tuple[int, int] | None
    short_side: int
    quality: int
    max_pixels: int = dataclasses.field(repr=False)
    num_turned: int

    def feature(self) -> Any:
        """Returns the TFDS feature."""
        import tensorflow_datasets as tfds

        dtype = np.dtype(self.dtype).type
        if self.size is not None:
            return tfds.features.Tensor(shape=(*self.size, self.channels), dtype=dtype)
        encoding = "png" if self.dtype == "uint16" else None
        return tfds.features.Image(shape=(None, None, self.channels), dtype=dtype, encoding_format=encoding)

    def __call__(self, name: str, data: bytes) -> bytes | np.ndarray:
        """Returns what is stored for a file: its bytes wherever that is possible."""
        try:
            return self._convert(data)
        except UndecodableImage as error:
            raise DataFault(f"{name} does not decode any more: {error}; it was changed meanwhile") from error

    def _convert(self, data: bytes) -> bytes | np.ndarray:
        decoder = Decoder(3, exif=True, max_pixels=self.max_pixels)
        header = decoder.header(data)
        is_file = not data.startswith(NPY) and (self.dtype == "uint8" or data.startswith(PNG))
        is_small = header.height > 0 and _shrunk(header[:2], self.short_side) == header[:2]
        if self.size is None and is_file and header.orientation == 1 and (is_small or not self.short_side):
            return data
        if data.startswith(JPEG) and header.height:
            out = np.empty((*_shrunk(header[:2], self.short_side), 1 if _is_gray(data) else 3), np.uint8)
            dataclasses.replace(decoder, channels=out.shape[-1]).decode_box(data, header, (0, 0, *header[:2]), out)
        else:
            image, has_alpha = load_upright(data, self.max_pixels)
            out = _resize(image, _shrunk(image.shape[:2], self.short_side), has_alpha and image.shape[-1] == 4)
            is_small = out.shape == image.shape
        if self.size is not None:
            return out
        if out.shape[-1] == 4 or out.dtype == np.uint16 or (is_small and not data.startswith(JPEG)):
            return _encode(".png", out)
        return _encode(".jpg", out, cv2.IMWRITE_JPEG_QUALITY, _UPRIGHT_QUALITY if is_small else self.quality)


def _is_gray(jpeg: bytes) -> bool:
    with PIL.Image.open(io.BytesIO(jpeg)) as image:
        return image.mode == "L"


def _shrunk(size: tuple[int, ...], short_side: int) -> tuple[int, int]:
    """Returns (H, W) with a short side of no more than `short_side`, unless that is 0."""
    height, width = size
    short = min(height, width)
    if not short_side or short <= short_side:
        return height, width
    return round(height * short_side / short), round(width * short_side / short)


def _resize(image: np.ndarray, size: tuple[int, int], has_alpha: bool) -> np.ndarray:
    """Resizes a whole image. # (H, W, C) -> (H', W', C)"""
    if image.shape[:2] == size:
        return image
    top = np.iinfo(image.dtype).max if image.dtype.kind == "u" else 1
    source = image
    if has_alpha:  # colours count as much as they are seen
        source = image.astype(np.float32)
        source[..., :3] *= source[..., 3:] / top
    out = np.empty((*size, image.shape[-1]), source.dtype)
    resize_box(source, (0, 0, *image.shape[:2]), out)
    if has_alpha:
        out[..., 3:] = np.clip(out[..., 3:], 0, top)
        out[..., :3] = np.clip(out[..., :3] * (top / np.maximum(out[..., 3:], 1)), 0, top)
        out = (np.rint(out) if image.dtype.kind == "u" else out).astype(image.dtype)
    return out


def _encode(suffix: str, image: np.ndarray, *options: int) -> bytes:
    """Encodes an image of 1, 3 or 4 channels in RGB order."""
    order = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[image.shape[-1]]
    return cv2.imencode(suffix, image[..., order], options)[1].tobytes()


def examine(
    folder: Folder, *, skip_undecodable: bool, short_side: int, quality: int, max_pixels: int = MAX_PIXELS
) -> tuple[dict[str, list[Image]], Storage]:
    """Decodes every file once, so that what is prepared can be trained on; after a kill all over again.

    Args:
      folder: the files.
      skip_undecodable: leave out files that do not decode or are of another type than most, instead of refusing them.
      short_side: as for `Storage`, like quality and max_pixels.

    Returns:
      The images of each split in their order, and how they are stored.

    Raises:
      ConfigError: images that only `data.source=folder` can read.
      DataFault: files that do not decode.
    """
    kinds, bad = _kinds(folder, max_pixels)
    counts = Counter(kind.dtype for kind in kinds.values())
    dtype = max(counts, key=lambda name: (counts[name], DTYPES.index(name)), default="uint8")
    for row, kind in kinds.items():
        if kind.dtype != dtype:
            bad[row] = f"an image of {kind.dtype} in a set of {dtype}"
    if bad:
        texts = [f"{readable(folder.listing.names[row])} ({reason})" for row, reason in sorted(bad.items())[:10]]
        total = sum(map(len, folder.rows.values()))
        if not skip_undecodable or len(bad) == total:
            raise DataFault(
                f"{len(bad)} of {total} files in {folder.root} do not decode, or are of another type: "
                f"{', '.join(texts)}; remove or restore them, or give --skip_undecodable to leave them out"
            )
        _LOG.warning("left out %d files that do not decode, or are of another type: %s", len(bad), ", ".join(texts))
    good = {split: [row for row in rows if row not in bad] for split, rows in folder.rows.items()}
    good = {split: rows for split, rows in good.items() if rows}
    used = {row: kinds[row] for rows in good.values() for row in rows}
    storage = _storage(folder, dtype, used, short_side, quality, max_pixels)
    root = os.fsdecode(folder.listing.root)
    splits = {
        split: [
            Image(
                os.fsdecode(folder.name(row)),
                int(folder.numbers[row]),
                os.path.join(root, os.fsdecode(folder.listing.names[row])),
                0,
                int(folder.listing.sizes[row]),
            )
            for row in rows
        ]
        for split, rows in good.items()
    }
    return splits, storage


def _kinds(folder: Folder, max_pixels: int) -> tuple[dict[int, _Kind], dict[int, str]]:
    """Returns what each file of the splits holds, or why that is not known."""
    rows = [row for of_split in folder.rows.values() for row in of_split]
    _LOG.info("decoding the %d files of %s", len(rows), folder.root)
    sizes = folder.listing.sizes
    progress = Progress("files", len(rows), int(sizes[rows].sum()))
    kinds: dict[int, _Kind] = {}
    bad: dict[int, str] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            paths = [os.path.join(folder.listing.root, folder.listing.names[row]) for row in chunk]
            for row, found in zip(chunk, pool.map(_examine, paths, itertools.repeat(max_pixels)), strict=True):
                inside = os.fsdecode(folder.name(row))
                if fault := names.text_fault(inside):
                    raise DataFault(f"the image {inside!r} has {fault}: TFDS stores the name beside the image")
                if isinstance(found, _Kind):
                    kinds[row] = found
                else:
                    bad[row] = found
                progress.add(int(sizes[row]))
    return kinds, bad


def _examine(path: bytes, max_pixels: int) -> _Kind | str:
    """Returns what a file holds, or why that is not known."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        return str(error)
    header = Decoder(3, exif=True, max_pixels=max_pixels).header(data)
    turned = header.orientation != 1
    try:
        if data.startswith(JPEG) and header.height:
            Decoder(3, max_pixels=max_pixels).decode(
                data, reduction=8
            )  # reads as much of the file as without, in a seventh of the time
            return _Kind("uint8", (*header[:2], 1 if _is_gray(data) else 3), False, turned)
        image, has_alpha = load_upright(data, max_pixels)
    except UndecodableImage as error:
        return str(error) if data else "it is empty"
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        return "it holds values that are not finite"
    channels = image.shape[-1]
    is_array = image.dtype.kind == "f" or not (channels in (1, 3) or (channels == 4 and has_alpha))
    return _Kind(str(image.dtype), (*image.shape[:2], channels), is_array, turned)


def _storage(
    folder: Folder, dtype: str, kinds: dict[int, _Kind], short_side: int, quality: int, max_pixels: int
) -> Storage:
    channels = {kind.shape[-1] for kind in kinds.values()}
    num_turned = sum(kind.is_turned for kind in kinds.values())
    arrays = [row for row, kind in kinds.items() if kind.is_array]
    if not arrays:
        count = channels.pop() if len(channels) == 1 and (dtype == "uint16" or channels == {4}) else 3
        return Storage(dtype, count, None, short_side, quality, max_pixels, num_turned)
    shapes = {kind.shape: row for row, kind in kinds.items()}
    if len(shapes) > 1:
        some = [f"{readable(folder.listing.names[row])}: {shape}" for shape, row in list(shapes.items())[:3]]
        raise ConfigError(
            f"{readable(folder.listing.names[arrays[0]])} is no 8-bit or 16-bit image of 1, 3 or 4 channels; such "
            f"files can be prepared only if all have one shape, and {folder.root} holds {', '.join(some)}; train on "
            f"the files where they are: --config.data.source=folder --config.data.data_dir={shlex.quote(folder.root)}"
        )
    (shape,) = shapes
    return Storage(dtype, shape[-1], _shrunk(shape[:2], short_side), short_side, quality, max_pixels, num_turned)
