"""Image files as arrays: formats, channels, bit depth, alpha, orientation.

Legend: H height, W width, C channels that a model takes, c channels that a file has; a box is (top, left, height,
width) in pixels.
"""

import contextlib
import io
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from mae_dist.data.resample import Box, resize_box

# The data pipeline already runs one image per thread or process; OpenCV's own pool would only fight XLA for the cores.
cv2.setNumThreads(0)
# Files that do not decode are named by whoever reads them; OpenCV would print a line about each as well.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

# From this many pixels a side on, a JPEG is decoded at a fraction of its size where that is enough. Smaller ones cost
# too little to be worth it.
PHOTOGRAPH_FROM = 64
DTYPES = ("uint8", "uint16", "float32")
_ROUNDING = 1e-6  # of a box's edges, in pixels
_NPY, _JPEG, _PNG = b"\x93NUMPY", b"\xff\xd8\xff", b"\x89PNG"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION = 0x0112  # the tag of EXIF

# Added to the flag of the colours, which replaces the "GRAYSCALE" of their names.
_REDUCTIONS = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}


class UndecodableImage(ValueError):
    """Bytes that are not a whole image with the channels asked for; the message says which."""


class Header(NamedTuple):
    """Size of the image as it is given out, (0, 0) if the bytes are no image; and its EXIF orientation, 1 upright."""

    height: int
    width: int
    orientation: int = 1


@dataclass(frozen=True)
class Decoder:
    """Decodes files to arrays of one type and number of channels.

    The range of a file's values is 0 to 255 where they are uint8; else 0 to `max_value`, or without one to 65535 for
    uint16 and to 1 for floating point. Decoded values have the range of `dtype`, of float32 always 0 to 1.

    Attributes:
      channels: C. 3 repeats grey and composites alpha; 1 takes the luminance of colours; any other number must be the
        file's own, 4 is RGBA where a file has colours.
      dtype: of the result: "uint8", "uint16" or "float32".
      max_value: the value that stands for 1 in files of more than 8 bits; 0: by their type.
      background: what transparent images are composited over where C is 1 or 3, 0 black to 1 white; None ignores alpha.
      exif: turns images upright by their EXIF orientation.
      deeper: accepts files of more bits than `dtype`, whose values are rounded.
    """

    channels: int
    dtype: str = "uint8"
    max_value: float = 0.0
    background: float | None = None
    exif: bool = False
    deeper: bool = True

    def header(self, data: bytes) -> Header:
        """Reads the size of an image without decoding it, where its format allows that."""
        with contextlib.suppress(OSError, ValueError, Image.DecompressionBombError):
            if data.startswith(_NPY):
                return Header(*_load_npy(data, self.channels).shape[:2])
            with Image.open(io.BytesIO(data)) as image:
                turned = image.getexif().get(_ORIENTATION, 1) if self.exif else 1
                width, height = image.size[::-1] if turned >= 5 else image.size
                return Header(height, width, turned)
        if data.startswith(_TIFF):  # of bands that Pillow does not know
            with contextlib.suppress(UndecodableImage):
                return Header(*_load_tiff(data, self.channels)[0].shape[:2])
        return Header(0, 0)

    def decode(self, data: bytes, reduction: int = 1) -> np.ndarray:
        """Decodes a file. # -> (H, W, C) of `dtype`, or rounded up (H / reduction, …)

        Args:
          data: the file.
          reduction: 1, 2, 4 or 8; a JPEG is then decoded at that fraction of its size, which is faster.

        Raises:
          UndecodableImage: the bytes are not a whole image, or not one of these channels and type.
        """
        turned = self.header(data).orientation if self.exif else 1
        return self._decode(data, turned, reduction)

    def decode_box(self, data: bytes, header: Header, box: Box, out: np.ndarray, *, margin: bool = False) -> None:
        """Decodes a file and resizes `box` of it into `out`. # -> out (H', W', C) of `dtype`, C-contiguous

        A JPEG of whose box no more than every second, fourth or eighth pixel is needed is decoded at that fraction of
        its size.

        Args:
          data: the file.
          header: what `header` returned for it.
          box: in pixels of the upright image.
          out: the result.
          margin: as for `resize_box`.

        Raises:
          UndecodableImage: as `decode`.
        """
        top, left, height, width = box
        reduction = 1
        if min(out.shape[:2]) >= PHOTOGRAPH_FROM and self.channels in (1, 3) and data.startswith(_JPEG):
            shrink = min(height / out.shape[0], width / out.shape[1])
            reduction = next((known for known in (8, 4, 2) if shrink >= known), 1)
        image = self._decode(data, header.orientation, reduction)
        if reduction > 1:
            top, left, height, width = (edge / reduction for edge in (top, left, height, width))
        if top + height > image.shape[0] + _ROUNDING or left + width > image.shape[1] + _ROUNDING:
            raise UndecodableImage(
                f"an image of {image.shape[0]} x {image.shape[1]} pixels, where its header says more"
            )
        resize_box(image, (top, left, height, width), out, margin=margin)

    def _decode(self, data: bytes, orientation: int, reduction: int) -> np.ndarray:
        colours = self.channels in (1, 3)
        as_it_comes = self == Decoder(self.channels, exif=self.exif)  # nothing is asked for that OpenCV does not do
        if colours and data.startswith(_JPEG):
            image = self._to_dtype(self._as_colours(data, reduction))
        elif colours and as_it_comes and not data.startswith((_NPY, *_TIFF)):
            image = self._as_colours(data, 1)
        else:
            image = self._to_dtype(self._to_channels(*_load(data, self.channels)))
        return _upright(image, orientation)

    def _as_colours(self, data: bytes, reduction: int) -> np.ndarray:
        """Decodes to uint8, grey or RGB, as OpenCV converts them."""
        flags = cv2.IMREAD_GRAYSCALE if self.channels == 1 else cv2.IMREAD_COLOR_RGB
        image = _imdecode(data, flags | _REDUCTIONS[reduction])
        return image.reshape(*image.shape[:2], self.channels)

    def _to_channels(self, image: np.ndarray, has_alpha: bool) -> np.ndarray:
        """Converts the channels of an image. # (H, W, c) -> (H, W, C)"""
        count = image.shape[-1]
        if count == self.channels:
            return image
        if count == 4 and has_alpha and self.channels in (1, 3):
            image, count = self._composite(image), 3
        if (count, self.channels) == (1, 3):
            return np.repeat(image, 3, axis=-1)
        if (count, self.channels) == (3, 1):
            return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
        if count == self.channels:
            return image
        raise UndecodableImage(f"an image of {count} channels where {self.channels} are asked for (model.channels)")

    def _composite(self, image: np.ndarray) -> np.ndarray:
        """Puts RGBA over the background. # (H, W, 4) -> (H, W, 3)"""
        colours, alpha = image[..., :3], image[..., 3:]
        if self.background is None:
            return np.ascontiguousarray(colours)
        top = np.float32(np.iinfo(image.dtype).max if image.dtype.kind == "u" else 1)
        opacity = alpha / top
        mixed = colours * opacity + np.float32(self.background) * top * (1 - opacity)
        return (np.rint(mixed) if image.dtype.kind == "u" else mixed).astype(image.dtype)

    def _to_dtype(self, image: np.ndarray) -> np.ndarray:
        """Converts the values of an image. # (H, W, C) uint8, uint16 or float32 -> of `dtype`"""
        if image.dtype.itemsize > np.dtype(self.dtype).itemsize and not self.deeper:
            raise UndecodableImage(
                f"an image of {image.dtype} in a set of {self.dtype}; set data.dtype='{image.dtype}' for all"
            )
        if image.dtype == self.dtype != "float32":
            return image
        fraction = image.astype(np.float32) / np.float32(self._range(image.dtype))
        if self.dtype == "float32":
            if not np.isfinite(fraction).all():
                raise UndecodableImage("it holds values that are not finite; replace them in the file")
            return fraction
        top = self._range(np.dtype(self.dtype))
        return np.rint(np.clip(fraction, 0, 1) * np.float32(top)).astype(self.dtype)

    def _range(self, dtype: np.dtype) -> float:
        """Returns the value that stands for 1."""
        return 255.0 if dtype == np.uint8 else self.max_value or (65535.0 if dtype == np.uint16 else 1.0)


def load_upright(data: bytes) -> tuple[np.ndarray, bool]:
    """Decodes what a file holds, whatever it is, turned by its EXIF orientation; and whether a fourth channel is alpha.

    Of three axes the first one holds the channels if it is shorter than the others.

    # -> (H, W, c) uint8, uint16 or float32, colours as RGB

    Raises:
      UndecodableImage: the bytes are not a whole image, or of another type.
    """
    image, has_alpha = _load(data, None)
    return _upright(image, Decoder(3, exif=True).header(data).orientation), has_alpha


def stored_dtype(data: bytes, channels: int) -> str | None:
    """Returns the type of the values in a file, one of `DTYPES`; None if it does not decode."""
    if data.startswith(_PNG):
        return "uint16" if data[24:25] == b"\x10" else "uint8"  # the bit depth in its header
    with contextlib.suppress(UndecodableImage):
        return str(_load(data, channels)[0].dtype)
    return None


def _load(data: bytes, channels: int | None) -> tuple[np.ndarray, bool]:
    """Decodes what a file holds, with colours in RGB order; and whether a fourth channel is alpha.

    # -> (H, W, c) uint8, uint16 or float32
    """
    has_alpha = True
    if data.startswith(_NPY):
        image, has_alpha = _load_npy(data, channels), False
    elif data.startswith(_TIFF):
        image, has_alpha = _load_tiff(data, channels)
    else:
        image = _load_colours(data)
    if image.dtype.kind == "f":
        image = image.astype(np.float32)
    elif image.dtype.name not in DTYPES:
        raise UndecodableImage(f"values of type {image.dtype}; write them as uint8, uint16 or float32")
    return image, has_alpha


def _load_colours(data: bytes) -> np.ndarray:
    """Decodes what OpenCV reads, as it is. # -> (H, W, c)"""
    image = _imdecode(data, cv2.IMREAD_UNCHANGED)
    image = image.reshape(*image.shape[:2], -1)
    order = [2, 1, 0, 3][: image.shape[-1]] if image.shape[-1] >= 3 else [0]  # from BGR(A)
    return np.ascontiguousarray(image[..., order])


def _imdecode(data: bytes, flags: int) -> np.ndarray:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        image = None
    if image is None:
        raise UndecodableImage(f"{len(data)} bytes starting {data[:8]!r} are not a whole image")
    return image


def _load_npy(data: bytes, channels: int | None) -> np.ndarray:
    try:
        return _planes_last(np.load(io.BytesIO(data), allow_pickle=False), channels)
    except (ValueError, EOFError, OSError) as error:
        raise UndecodableImage(f"no whole .npy file: {error}") from error


def _load_tiff(data: bytes, channels: int | None) -> tuple[np.ndarray, bool]:
    """Decodes a TIFF file of any bands; and whether a fourth one is alpha.

    Several images of one size are its bands; of several sizes the first one is taken.
    """
    import tifffile

    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page, shape = file.pages.first, file.series[0].shape
            # OpenCV knows more compressions and kinds of colours, but drops bands beyond the fourth.
            plain = page.photometric in (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB)
            if len(file.pages) == 1 and page.samplesperpixel <= 4 and not (plain and page.compression == 1):
                return _load_colours(data), bool(page.extrasamples) or not plain
            whole = len(shape) == 3 and channels in (None, shape[0], shape[2])
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


def _planes_last(array: np.ndarray, channels: int | None) -> np.ndarray:
    """Returns an image of (H, W), (H, W, c) or (C, H, W) as (H, W, c); C is `channels` or, of None, the fewest."""
    if array.ndim == 2:
        return array[..., None]
    if channels is None and array.ndim == 3 and array.shape[0] < min(array.shape[1:]):
        channels = array.shape[0]
    if array.ndim == 3 and array.shape[0] == channels != array.shape[2]:
        return np.ascontiguousarray(np.moveaxis(array, 0, -1))
    if array.ndim == 3:
        return array
    raise UndecodableImage(f"an array of shape {array.shape}, not (height, width), with channels first or last or none")


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes an EXIF orientation. # (H, W, C) -> (H, W, C) or (W, H, C), C-contiguous"""
    if orientation in (5, 6, 7, 8):
        image = image.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)
