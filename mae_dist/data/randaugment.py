"""RandAugment (Cubuk et al. 2020) as timm's `rand-m9-mstd0.5-inc1` does it, the variant that fine-tunes MAE.

An operation gives what Pillow's of that name gives, to the last bit where no pixel moves. Most are one look-up per
pixel: Pillow's own cost as much again as a crop. Nothing here draws random numbers; see `transforms`.

Legend: N images, H height, W width, C channels (1 grey, 3 RGB), all uint8; K layers; a fill colour has one value or C.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

MAX_MAGNITUDE = 10.0
UNIFORMS_PER_LAYER = 5  # whether at all, which operation, two for the normal magnitude, and the sign
_APPLIED_FRACTION = 0.5
# The six numbers of Pillow's affine transforms: column and row of the source for a place (x, y, 1) in the result.
Matrix = tuple[float, float, float, float, float, float]
Fill = tuple[int, ...]
_VALUES = np.arange(256)[:, None]


def autocontrast(image: np.ndarray) -> np.ndarray:
    """Stretches each channel over 0..255. # (H, W, C) -> the same"""
    counts = _histograms(image)
    low, high = _lowest(counts), 255 - _lowest(counts[::-1])  # (C,) each
    scale = 255.0 / np.maximum(high - low, 1)
    stretched = np.clip(_VALUES * scale + -low * scale, 0, 255)  # (256, C)
    return _look_up(image, np.where(high > low, stretched, _VALUES))


def equalize(image: np.ndarray) -> np.ndarray:
    """Makes the values of each channel about equally frequent. # (H, W, C) -> the same"""
    counts = _histograms(image)
    of_highest = np.take_along_axis(counts, 255 - _lowest(counts[::-1])[None], axis=0)  # (1, C)
    step = (counts.sum(axis=0) - of_highest) // 255  # 0: one value only, or too few pixels
    below = np.cumsum(counts, axis=0) - counts  # pixels of smaller value, (256, C)
    spread = np.minimum((step // 2 + below) // np.maximum(step, 1), 255)
    return _look_up(image, np.where(step > 0, spread, _VALUES))


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """Keeps the highest `bits` (1..8) of each value. # (H, W, C) -> the same"""
    return image & np.uint8(256 - (1 << (8 - bits)))


def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
    """Inverts values from `threshold` (0..256) on. # (H, W, C) -> the same"""
    return _look_up(image, np.where(threshold <= _VALUES, 255 - _VALUES, _VALUES))


def solarize_add(image: np.ndarray, amount: int) -> np.ndarray:
    """Adds to values below 128. # (H, W, C) -> the same"""
    return _look_up(image, np.where(_VALUES < 128, np.minimum(_VALUES + amount, 255), _VALUES))


def color(image: np.ndarray, level: float) -> np.ndarray:
    """Changes the saturation; level -1 leaves a tenth of it. # (H, W, C) -> the same"""
    return image if image.shape[2] == 1 else _blend(_luminance(image)[:, :, None], image, level)


def contrast(image: np.ndarray, level: float) -> np.ndarray:
    """Changes the distance from the mean luminance; level -1 leaves a tenth of it. # (H, W, C) -> the same"""
    luminance = _luminance(image)
    mean = np.uint8(luminance.sum(dtype=np.int64) / luminance.size + 0.5)
    return _look_up(image, _blend(mean, _VALUES.astype(np.uint8), level))


def brightness(image: np.ndarray, level: float) -> np.ndarray:
    """Changes the distance from black; level -1 leaves a tenth of it. # (H, W, C) -> the same"""
    return _look_up(image, _blend(np.uint8(0), _VALUES.astype(np.uint8), level))


def sharpness(image: np.ndarray, level: float) -> np.ndarray:
    """Changes the distance from a 3x3 blur, which leaves the border as it is. # (H, W, C) -> the same"""
    if min(image.shape[:2]) < 3:
        return image
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
    smooth = image.copy()
    smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, kernel).reshape(image.shape)[1:-1, 1:-1]
    return _blend(smooth, image, level)


def affine(image: np.ndarray, matrix: Matrix, fill: Fill) -> np.ndarray:
    """Moves pixels, bicubic as the crops and as the paper's recipe asks; `fill` where the source is outside.

    OpenCV's cubic kernel has a = -0.75 and Pillow's -0.5: up to 3 of 255 apart in smooth images, 16 in
    noise, 42 if that is rotated. # (H, W, C) -> the same
    """
    height, width = image.shape[:2]
    a, b, c, d, e, f = matrix
    # OpenCV counts from the centre of the first pixel and Pillow from its corner.
    centred = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])
    moved = cv2.warpAffine(
        image, centred, (width, height), flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE
    ).reshape(image.shape)
    x, y = np.arange(width)[None] + 0.5, np.arange(height)[:, None] + 0.5  # (1, W), (H, 1)
    # Outside are columns a x + b y + c < 0 or >= W, and rows; written so that no (H, W) of floats is made.
    column, across, row, down = a * x + c, -b * y, d * x + f, -e * y
    outside = (column < across) | (column - width >= across) | (row < down) | (row - height >= down)  # (H, W)
    cv2.copyTo(_plain(image.shape, fill), outside.view(np.uint8), moved)
    return moved


@functools.lru_cache(maxsize=4)
def _plain(shape: tuple[int, int, int], fill: Fill) -> np.ndarray:
    """Returns an image of one colour. # (H, W, C)"""
    plain = np.empty(shape, np.uint8)
    plain[...] = fill
    return plain


def rotate(image: np.ndarray, degrees: float, fill: Fill) -> np.ndarray:
    """Turns counter-clockwise about the centre. # (H, W, C) -> the same"""
    x, y = image.shape[1] / 2, image.shape[0] / 2
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return affine(image, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y), fill)


def _histograms(image: np.ndarray) -> np.ndarray:
    """Counts the pixels of each value. # (H, W, C) -> (256, C) int64"""
    counts = [cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel() for channel in range(image.shape[2])]
    return np.stack(counts, axis=1).astype(np.int64)


def _lowest(counts: np.ndarray) -> np.ndarray:
    """Returns the lowest value that occurs. # (256, C) -> (C,)"""
    return np.argmax(counts > 0, axis=0)


def _look_up(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Applies one table for all channels, (256, 1), or one each, (256, C). # (H, W, C) -> the same"""
    return cv2.LUT(image, table.astype(np.uint8)[None]).reshape(image.shape)


def _luminance(image: np.ndarray) -> np.ndarray:
    """Returns ITU-R 601's, with Pillow's integer weights; OpenCV rounds otherwise. # (H, W, C) -> (H, W)"""
    if image.shape[2] == 1:
        return image[:, :, 0]
    weights = np.array([[19595, 38470, 7471]], np.float32)  # of 65536; every sum fits float32 exactly
    return ((cv2.transform(image.astype(np.float32), weights) + 32768) * 2.0**-16).astype(np.uint8)


def _blend(zero: np.ndarray | np.uint8, image: np.ndarray, level: float) -> np.ndarray:
    """Goes from `image` towards `zero` (level < 0) or away from it, in float32 as Pillow. # uint8 -> as `image`"""
    factor, start = np.float32(max(0.1, 1 + 0.9 * level)), np.float32(zero)
    blended = start + factor * (image.astype(np.float32) - start)
    return np.clip(blended, 0, 255).astype(np.uint8)


# Name -> (image, level, fill) -> image. The level is -1..1: the farther from 0, the stronger ("increasing"); its sign
# is the direction, where there are two.
OPERATIONS: dict[str, Callable[[np.ndarray, float, Fill], np.ndarray]] = {
    "AutoContrast": lambda image, level, fill: autocontrast(image),
    "Equalize": lambda image, level, fill: equalize(image),
    "Invert": lambda image, level, fill: 255 - image,
    "Rotate": lambda image, level, fill: rotate(image, 30 * level, fill),
    # At level 1 timm keeps no bit at all, which Pillow no longer does: at least one.
    "Posterize": lambda image, level, fill: posterize(image, max(1, 4 - int(4 * abs(level)))),
    "Solarize": lambda image, level, fill: solarize(image, 256 - int(256 * abs(level))),
    "SolarizeAdd": lambda image, level, fill: solarize_add(image, int(110 * abs(level))),
    "Color": lambda image, level, fill: color(image, level),
    "Contrast": lambda image, level, fill: contrast(image, level),
    "Brightness": lambda image, level, fill: brightness(image, level),
    "Sharpness": lambda image, level, fill: sharpness(image, level),
    "ShearX": lambda image, level, fill: affine(image, (1, 0.3 * level, 0, 0, 1, 0), fill),
    "ShearY": lambda image, level, fill: affine(image, (1, 0, 0, 0.3 * level, 1, 0), fill),
    "TranslateX": lambda image, level, fill: affine(image, (1, 0, 0.45 * level * image.shape[1], 0, 1, 0), fill),
    "TranslateY": lambda image, level, fill: affine(image, (1, 0, 0, 0, 1, 0.45 * level * image.shape[0]), fill),
}
_OPERATIONS = tuple(OPERATIONS.values())


@dataclass(frozen=True)
class RandAugment:
    """Draws operations for each image: `layers` times one of all, applied half of the time.

    Attributes:
      layers: K.
      magnitude: mean strength, above 0 and up to 10.
      std: its standard deviation; what is drawn is clipped to 0..10.
      fill: colour of what an image moved away from; the data's mean, as timm.
    """

    layers: int
    magnitude: float
    std: float
    fill: Fill

    @property
    def num_uniforms(self) -> int:
        """Returns how many random numbers an image takes."""
        return self.layers * UNIFORMS_PER_LAYER

    def levels(self, uniforms: np.ndarray) -> np.ndarray:
        """Returns strengths, 0..1, normal before they are clipped (Box and Muller 1958). # (…, 2) -> (…)"""
        normal = np.sqrt(-2 * np.log1p(-uniforms[..., 0])) * np.cos(2 * np.pi * uniforms[..., 1])
        return np.clip(self.magnitude + self.std * normal, 0, MAX_MAGNITUDE) / MAX_MAGNITUDE

    def __call__(self, images: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """Changes the images in place.

        Args:
          images: uint8, C-contiguous, with 1 or 3 channels. # (N, H, W, C)
          uniforms: in [0, 1). # (N, num_uniforms)

        Returns:
          The images.
        """
        draws = uniforms.reshape(len(images), self.layers, UNIFORMS_PER_LAYER)  # (N, K, 5)
        applied = draws[..., 0] < _APPLIED_FRACTION  # (N, K)
        chosen = (draws[..., 1] * len(_OPERATIONS)).astype(np.int64)  # (N, K)
        levels = self.levels(draws[..., 2:4]) * np.where(draws[..., 4] < 0.5, -1, 1)  # (N, K)
        for row, layer in np.argwhere(applied):
            images[row] = _OPERATIONS[chosen[row, layer]](images[row], float(levels[row, layer]), self.fill)
        return images
