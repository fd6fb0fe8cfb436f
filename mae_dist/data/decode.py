"""Image files as the arrays that a model takes: channels, bit depth, alpha, orientation, size.

Legend: H height, W width, C channels that a model takes, c channels that a file has; a box is (top, left, height,
width) in pixels.
"""

import contextlib
from dataclasses import dataclass

import cv2
import numpy as np

from mae_dist.data import image_files
from mae_dist.data.image_files import MAX_PIXELS, Header, UndecodableImage
from mae_dist.data.resample import Box, resize_box

# The data pipeline already runs one image per thread or process; OpenCV's own pool would only fight XLA for the cores.
cv2.setNumThreads(0)

# From this many pixels a side on, a JPEG is decoded at a fraction of its size where that is enough. Smaller ones cost
# too little to be worth it.
PHOTOGRAPH_FROM = 64
_ROUNDING = 1e-6  # of a box's edges, in pixels

# Added to the flag of the colours, which replaces the "GRAYSCALE" of their names.
_REDUCTIONS = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}


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
      max_pixels: refuses larger images by their headers; a small file may say that it holds gigabytes.
    """

    channels: int
    dtype: str = "uint8"
    max_value: float = 0.0
    background: float | None = None
    exif: bool = False
    deeper: bool = True
    max_pixels: int = MAX_PIXELS

    def header(self, data: bytes) -> Header:
        """Reads the size of an image without decoding it; (0, 0) where it cannot or may not be decoded."""
        try:
            return self._header(data)
        except UndecodableImage:
            return Header(0, 0)

    def _header(self, data: bytes) -> Header:
        return image_files.read_header(data, self.channels, self.exif, self.max_pixels)

    def decode(self, data: bytes, reduction: int = 1) -> np.ndarray:
        """Decodes a file. # -> (H, W, C) of `dtype`, or rounded up (H / reduction, …)

        Args:
          data: the file.
          reduction: 1, 2, 4 or 8; a JPEG is then decoded at that fraction of its size, which is faster.

        Raises:
          UndecodableImage: the bytes are not a whole image, or not one of these channels and type, or it is too large.
        """
        # `image_files.load` checks the size of a TIFF file itself; Pillow would warn about a truncated one.
        is_upright_tiff = data.startswith(image_files.TIFF) and not self.exif
        return self._decode(data, 1 if is_upright_tiff else self._header(data).orientation, reduction)

    def decode_box(self, data: bytes, header: Header, box: Box, out: np.ndarray, *, margin: bool = False) -> None:
        """Decodes a file and resizes `box` of it into `out`. # -> out (H', W', C) of `dtype`, C-contiguous

        A JPEG of whose box no more than every second, fourth or eighth pixel is needed is decoded at that fraction of
        its size.

        Args:
          data: the file.
          header: what `header` returned for it, with a size.
          box: in pixels of the upright image.
          out: the result.
          margin: as for `resize_box`.

        Raises:
          UndecodableImage: as `decode`.
        """
        top, left, height, width = box
        reduction = 1
        if min(out.shape[:2]) >= PHOTOGRAPH_FROM and self.channels in (1, 3) and data.startswith(image_files.JPEG):
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
        # Nothing is asked for that OpenCV does not do.
        as_it_comes = self == Decoder(self.channels, exif=self.exif, max_pixels=self.max_pixels)
        if colours and data.startswith(image_files.JPEG):
            image = self._to_dtype(self._as_colours(data, reduction))
        elif colours and as_it_comes and not data.startswith((image_files.NPY, *image_files.TIFF)):
            image = self._as_colours(data, 1)
        else:
            image = self._to_dtype(self._to_channels(*image_files.load(data, self.channels, self.max_pixels)))
        return image_files.upright(image, orientation)

    def _as_colours(self, data: bytes, reduction: int) -> np.ndarray:
        """Decodes to uint8, grey or RGB, as OpenCV converts them."""
        flags = cv2.IMREAD_GRAYSCALE if self.channels == 1 else cv2.IMREAD_COLOR_RGB
        image = image_files.imdecode(data, flags | _REDUCTIONS[reduction])
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


def stored_dtype(data: bytes, decoder: Decoder) -> str | None:
    """Returns the type of the values in a file, one of `DTYPES`; None if it does not decode."""
    if data.startswith(image_files.PNG):
        return "uint16" if data[24:25] == b"\x10" else "uint8"  # the bit depth in its header
    if not decoder.header(data).height:
        return None
    with contextlib.suppress(UndecodableImage):
        return str(image_files.load(data, decoder.channels, decoder.max_pixels)[0].dtype)
    return None
