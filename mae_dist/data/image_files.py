"""Reads image files of any format as they are: size, orientation and pixels.

Legend: H height, W width, c channels that a file has, C channels that a model takes.
"""

import io
import math
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

# Files that do not decode are named by whoever reads them; OpenCV would print a line about each as well.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

DTYPES = ("uint8", "uint16", "float32")
# Pillow's default limit: it refuses to open larger images. `config.data.max_pixels` has the same default.
MAX_PIXELS = 178_956_970
NPY, JPEG, PNG = b"\x93NUMPY", b"\xff\xd8\xff", b"\x89PNG"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION = 0x0112  # the tag of EXIF


class UndecodableImage(ValueError):
    """Bytes that are not a whole image with the channels asked for; the message says which."""


class Header(NamedTuple):
    """Size of the image as it is given out, (0, 0) if the bytes are no image; and its EXIF orientation, 1 upright."""

    height: int
    width: int
    orientation: int = 1


def _refuse_large(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise UndecodableImage(
            f"an image of {height:,} x {width:,} pixels, more than {max_pixels:,}: shrink it, or raise data.max_pixels"
        )


def read_header(data: bytes, channels: int | None, exif: bool, max_pixels: int) -> Header:
    """Reads the size of an image without decoding it, where its format allows that.

    Args:
      data: the file.
      channels: C; tells (C, H, W) from (H, W, c), where None takes the fewest for channels.
      exif: also read the orientation.
      max_pixels: the most that an image may have.

    Raises:
      UndecodableImage: no header says a size, or it is of more than `max_pixels`.
    """
    header = _read_header(data, channels, exif, max_pixels)
    _refuse_large(header.height, header.width, max_pixels)
    return header


def _read_header(data: bytes, channels: int | None, exif: bool, max_pixels: int) -> Header:
    if data.startswith(NPY):
        return Header(*_plane(_npy_shape(data), channels))
    if max_pixels > MAX_PIXELS:
        Image.MAX_IMAGE_PIXELS = None  # Pillow's limit, where the user has chosen another
    try:
        with Image.open(io.BytesIO(data)) as image:
            turned = image.getexif().get(_ORIENTATION, 1) if exif else 1
            width, height = image.size[::-1] if turned >= 5 else image.size
            return Header(height, width, turned)
    except Image.DecompressionBombError as error:
        raise UndecodableImage(f"{error} Shrink it, or raise data.max_pixels") from error
    except (OSError, ValueError) as error:
        if data.startswith(TIFF):  # of bands that Pillow does not know
            return Header(*_load_tiff(data, channels, max_pixels)[0].shape[:2])
        raise UndecodableImage(f"{len(data)} bytes starting {data[:8]!r} are not a whole image") from error


def load_upright(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, bool]:
    """Decodes what a file holds, whatever it is, turned by its EXIF orientation; and whether a fourth channel is alpha.

    Of three axes the first one holds the channels if it is shorter than the others.

    # -> (H, W, c) uint8, uint16 or float32, colours as RGB

    Raises:
      UndecodableImage: the bytes are not a whole image, or of another type, or it has more than `max_pixels`.
    """
    header = read_header(data, None, True, max_pixels)
    image, has_alpha = load(data, None, max_pixels)
    return upright(image, header.orientation), has_alpha


def load(data: bytes, channels: int | None, max_pixels: int) -> tuple[np.ndarray, bool]:
    """Decodes what a file holds, with colours in RGB order; and whether a fourth channel is alpha.

    # -> (H, W, c) uint8, uint16 or float32
    """
    has_alpha = True
    if data.startswith(NPY):
        image, has_alpha = _load_npy(data, channels), False
    elif data.startswith(TIFF):
        image, has_alpha = _load_tiff(data, channels, max_pixels)
    else:
        image = _load_colours(data)
    if image.dtype.kind == "f":
        image = image.astype(np.float32)
    elif image.dtype.name not in DTYPES:
        raise UndecodableImage(f"values of type {image.dtype}; write them as uint8, uint16 or float32")
    return image, has_alpha


def _load_colours(data: bytes) -> np.ndarray:
    """Decodes what OpenCV reads, as it is. # -> (H, W, c)"""
    image = imdecode(data, cv2.IMREAD_UNCHANGED)
    image = image.reshape(*image.shape[:2], -1)
    order = [2, 1, 0, 3][: image.shape[-1]] if image.shape[-1] >= 3 else [0]  # from BGR(A)
    return np.ascontiguousarray(image[..., order])


def imdecode(data: bytes, flags: int) -> np.ndarray:
    """Decodes by OpenCV, not turned; raises `UndecodableImage` if that fails."""
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        image = None
    if image is None:
        raise UndecodableImage(f"{len(data)} bytes starting {data[:8]!r} are not a whole image")
    return image


def _npy_shape(data: bytes) -> tuple[int, ...]:
    """Reads the shape of an array; raises `UndecodableImage` if the file is shorter than it says."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    except (ValueError, EOFError) as error:
        raise UndecodableImage(f"no whole .npy file: {error}") from error
    if math.prod(shape) * dtype.itemsize > len(data):
        raise UndecodableImage(f"no whole .npy file: {len(data)} bytes for an array of shape {shape}")
    return shape


def _load_npy(data: bytes, channels: int | None) -> np.ndarray:
    _npy_shape(data)
    try:
        return _planes_last(np.load(io.BytesIO(data), allow_pickle=False), channels)
    except (ValueError, EOFError, OSError) as error:
        raise UndecodableImage(f"no whole .npy file: {error}") from error


def _load_tiff(data: bytes, channels: int | None, max_pixels: int) -> tuple[np.ndarray, bool]:
    """Decodes a TIFF file of any bands; and whether a fourth one is alpha.

    Several images of one size are its bands; of several sizes the first one is taken.
    """
    import tifffile

    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page, shape = file.pages.first, file.series[0].shape
            _refuse_large(page.imagelength, page.imagewidth, max_pixels)
            # OpenCV knows more compressions and kinds of colours, but drops bands beyond the fourth.
            plain = page.photometric in (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB)
            if len(file.pages) == 1 and page.samplesperpixel <= 4 and not (plain and page.compression == 1):
                return _load_colours(data), bool(page.extrasamples) or not plain
            whole = len(shape) == 3 and channels in (None, shape[0], shape[2])
            if whole:  # of several images, which may be called bands
                _refuse_large(*_plane(shape, channels), max_pixels)
            count = len(file.series[0].pages)
            if count > 1 and not whole:
                raise UndecodableImage(
                    f"a TIFF file of {count} images of one size; model.channels={count} takes them as its bands, "
                    "otherwise write each to a file of its own"
                )
            image = _planes_last(file.asarray() if whole else page.asarray(), channels)
            return image, any(extra != tifffile.EXTRASAMPLE.UNSPECIFIED for extra in page.extrasamples)
    except UndecodableImage:
        raise
    except Exception as error:  # of any type, the library's own and NumPy's, for what is corrupted
        raise UndecodableImage(f"a TIFF file that cannot be read: {error}") from error


def _planes_first(shape: tuple[int, ...], channels: int | None) -> bool:
    """True if (a, b, c) is (C, H, W), where C is `channels` or, of None, the fewest; false if (H, W) or (H, W, c)."""
    if len(shape) not in (2, 3):
        raise UndecodableImage(f"an array of shape {shape}, not (height, width), with channels first or last or none")
    if channels is None and len(shape) == 3 and shape[0] < min(shape[1:]):
        channels = shape[0]
    return len(shape) == 3 and shape[0] == channels != shape[2]


def _plane(shape: tuple[int, ...], channels: int | None) -> tuple[int, int]:
    """Returns (H, W) of an array of this shape."""
    first = _planes_first(shape, channels)
    return shape[first], shape[first + 1]


def _planes_last(array: np.ndarray, channels: int | None) -> np.ndarray:
    """Returns an image of (H, W), (H, W, c) or (C, H, W) as (H, W, c)."""
    if _planes_first(array.shape, channels):
        return np.ascontiguousarray(np.moveaxis(array, 0, -1))
    return array if array.ndim == 3 else array[..., None]


def upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes an EXIF orientation. # (H, W, C) -> (H, W, C) or (W, H, C), C-contiguous"""
    if orientation in (5, 6, 7, 8):
        image = image.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)
