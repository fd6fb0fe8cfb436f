"""Centre crop, random resized crop (Szegedy et al. 2015), flip.

Nothing here draws random numbers. The caller passes uniforms that it derives from (seed, step, row), so the same row
gets the same crop on whichever host or worker computes it.

Legend: N rows, H height, W width, C channels (1 grey, 3 RGB, 4 RGBA); a box is (top, left, height, width) in pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mae_dist.data.resample import resize_box, resize_boxes
from mae_dist.errors import ConfigError
from mae_dist.registry import Registry

CROP_TRIES = 10  # as torchvision.transforms.RandomResizedCrop
CROP_UNIFORMS = 2 * CROP_TRIES + 2  # per try an area and an aspect ratio, then one position (top, left)

ImageFunction = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Augmentation:
    """An entry that `config.data.augment` names: crop, flip, then `function`; see `register_augmentation`."""

    crop: bool = False
    flip: bool = False
    function: ImageFunction | None = None
    num_uniforms: int = 0

    def apply(self, images: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """Applies `function` to each image, in place. # (N, H, W, C), (N, U) -> (N, H, W, C)"""
        assert self.function is not None
        for image, numbers in zip(images, uniforms, strict=True):
            changed = self.function(image, numbers)
            if changed.shape != image.shape or changed.dtype != image.dtype:
                raise ConfigError(
                    f"the function of data.augment returns {changed.dtype} of shape {changed.shape} for an image of "
                    f"shape {image.shape}; needed: {image.dtype} of the same shape"
                )
            image[:] = changed
        return images


AUGMENTATIONS: Registry[Augmentation] = Registry("data.augment")
AUGMENTATIONS.add("none", Augmentation(), Augmentation)
AUGMENTATIONS.add("flip", Augmentation(flip=True), Augmentation)
AUGMENTATIONS.add("crop_flip", Augmentation(crop=True, flip=True), Augmentation)


def register_augmentation(
    name: str, *, num_uniforms: int, crop: bool = False, flip: bool = False
) -> Callable[[ImageFunction], ImageFunction]:
    """Adds an augmentation, for `config.data.augment` to name: a decorator of the function that changes one image.

    The function takes an image (H, W, C), uint8 unless `data.dtype` says otherwise, and `num_uniforms` numbers float64
    in [0, 1), drawn for this image of this step, and returns an image like the one given. All that is random in it must
    come from these numbers: then the batch of a step is the same on any number of hosts and workers, and after a
    resume. It stands at the top level of its module, which worker processes import.

    Args:
      name: of the augmentation.
      num_uniforms: how many numbers the function needs.
      crop: whether it follows the random resized crop of "crop_flip".
      flip: whether it follows the mirroring of half of the images.

    Raises:
      ConfigError: another function has the name.
    """

    def add(function: ImageFunction) -> ImageFunction:
        AUGMENTATIONS.add(name, Augmentation(crop, flip, function, num_uniforms), function)
        return function

    return add


@dataclass(frozen=True)
class RandomCrops:
    """Random resized crops of N rows, before the sizes of their images are known.

    Attributes:
      uniforms: float64 in [0, 1), one row per image. # (N, CROP_UNIFORMS)
      scale: smallest and largest area as a fraction of the image's.
      ratio: smallest and largest width / height.
    """

    uniforms: np.ndarray
    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def take(self, rows: np.ndarray) -> "RandomCrops":
        return RandomCrops(self.uniforms[rows], self.scale, self.ratio)

    def boxes(self, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """Draws boxes as torchvision does: area and log aspect ratio uniform, ten tries, then the centre.

        Returns:
          Boxes inside images of the given sizes, int64. # (N,), (N,) -> (N, 4)
        """
        area_draw, ratio_draw = self.uniforms[:, :CROP_TRIES], self.uniforms[:, CROP_TRIES : 2 * CROP_TRIES]  # (N, T)
        area = (heights * widths)[:, None] * (self.scale[0] + area_draw * (self.scale[1] - self.scale[0]))
        log_low, log_high = math.log(self.ratio[0]), math.log(self.ratio[1])
        aspect = np.exp(log_low + ratio_draw * (log_high - log_low))
        try_widths = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        try_heights = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = (np.minimum(try_widths, try_heights) > 0) & (try_widths <= widths[:, None])
        fits &= try_heights <= heights[:, None]
        first = np.argmax(fits, axis=1)  # (N,) the first try that fits, 0 if none does
        rows = np.arange(len(fits))
        box_heights, box_widths = try_heights[rows, first], try_widths[rows, first]
        top = np.floor(self.uniforms[:, -2] * (heights - box_heights + 1)).astype(np.int64)
        left = np.floor(self.uniforms[:, -1] * (widths - box_widths + 1)).astype(np.int64)
        boxes = np.stack([top, left, box_heights, box_widths], axis=1)
        for row in np.flatnonzero(~fits.any(axis=1)):
            boxes[row] = _fallback_box(int(heights[row]), int(widths[row]), self.ratio)
        return boxes


def center_box(height: int, width: int, size: tuple[int, int], zoom: float = 1.0) -> tuple[float, float, float, float]:
    """Returns the box that "resize the short side to zoom * size, crop the centre" leaves, its edges within pixels.

    Resized with a margin it gives what torchvision's Resize and CenterCrop give, in one resampling of the box alone:
    they round the size of the whole resized image and the place of the crop in it, which is done here, too.

    Args:
      height: of the image, in pixels.
      width: of the image, in pixels.
      size: (height, width) of the result.
      zoom: 1 keeps all of the short side; 256 / 224 is the usual evaluation crop.
    """
    if height * size[1] <= width * size[0]:  # the height is what limits
        resized_height = round(zoom * size[0])
        resized_width = resized_height * width // height
    else:
        resized_width = round(zoom * size[1])
        resized_height = resized_width * height // width
    top, left = round((resized_height - size[0]) / 2), round((resized_width - size[1]) / 2)
    return (
        top * height / resized_height,
        left * width / resized_width,
        size[0] * height / resized_height,
        size[1] * width / resized_width,
    )


def _fallback_box(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    """Returns the largest centred box whose aspect ratio is allowed."""
    aspect = min(max(width / height, ratio[0]), ratio[1])
    box_height = min(height, max(1, round(width / aspect)))
    box_width = min(width, max(1, round(height * aspect)))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def resize_images(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes the short side, crops the centre. # (N, H, W, C) -> (N, *size, C)"""
    if images.shape[1:3] == size:
        return images
    box = center_box(images.shape[1], images.shape[2], size)
    out = np.empty((len(images), *size, images.shape[3]), images.dtype)
    for image, target in zip(images, out, strict=True):
        resize_box(image, box, target, margin=True)
    return out


def crop_images(images: np.ndarray, crops: RandomCrops) -> np.ndarray:
    """Crops images of one size at random and resizes them back to that size. # (N, H, W, C) -> the same"""
    count, height, width = images.shape[:3]
    boxes = crops.boxes(np.full(count, height), np.full(count, width))
    out = np.empty_like(images)
    resize_boxes(images, boxes, out)
    return out


def flip_images(images: np.ndarray, flip: np.ndarray) -> np.ndarray:
    """Mirrors, in place, the rows where `flip` is true. # (N, H, W, C), (N,) bool -> (N, H, W, C)"""
    images[flip] = images[flip, :, ::-1]
    return images
