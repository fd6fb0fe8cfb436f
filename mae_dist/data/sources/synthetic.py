"""Labelled shapes drawn on demand: any number, size and channels, no files; the class is a shape in a colour.

Every example is a pure function of (seed, base split, index).

Legend: N examples asked for, H height, W width, C channels.
"""

import colorsys

import numpy as np

from mae_dist.data.dataset import ArrayDataset, Dataset, Read, digest
from mae_dist.data.sources import register_source
from mae_dist.data.splits import Span, parse_split
from mae_dist.data.transforms import RandomCrops, crop_images
from mae_dist.errors import ConfigError

SHAPES = ("disc", "square", "triangle", "ring", "cross")
_BASE_SPLITS = ("train", "test")  # the position is part of an example's random key
_NUM_DRAWS = 9
_CHUNK_BYTES = 256 * 1024  # of one temporary: drawing in chunks keeps them in the processor's cache


@register_source("synthetic")
def open_synthetic(
    split: str,
    *,
    image_size: tuple[int, int],
    channels: int,
    num_examples: int,
    num_classes: int,
    cache: str,
    seed: int = 0,
) -> Dataset:
    """Opens "train" (num_examples) and "test" (a fifth of it), or slices of them, drawn once if cache="memory".

    Returns:
      Images uint8 (N, *image_size, channels).

    Raises:
      ConfigError: the split is unknown or empty, or a count is below 1.
    """
    if num_examples < 5 or num_classes < 1 or channels not in (1, 3):
        raise ConfigError(
            f"data.num_examples={num_examples}, data.num_classes={num_classes}, model.channels={channels}: synthetic "
            "data needs at least 5 examples (a fifth is the test split), 1 class, and 1 or 3 channels"
        )
    spans = parse_split(split, {"train": num_examples, "test": num_examples // 5})
    drawn = SyntheticDataset(spans, image_size=image_size, channels=channels, num_classes=num_classes, seed=seed)
    if cache != "memory":
        return drawn
    return ArrayDataset(
        drawn.examples(np.arange(drawn.num_examples)),
        num_classes=num_classes,
        class_names=drawn.class_names,
        fingerprint=drawn.fingerprint,
    )


class SyntheticDataset(Dataset):
    """Draws the examples it is asked for."""

    in_memory = False

    def __init__(self, spans: list[Span], *, image_size: tuple[int, int], channels: int, num_classes: int, seed: int):
        self.spans = spans
        self.image_size = image_size
        self.channels = channels
        self.seed = seed
        self.num_examples = sum(span.stop - span.start for span in spans)
        self.num_classes = num_classes
        self.class_names = tuple(f"{SHAPES[c % len(SHAPES)]} {c // len(SHAPES)}" for c in range(num_classes))
        identity = {"source": "synthetic", "version": 1, "spans": spans, "seed": seed, "num_classes": num_classes}
        self.fingerprint = digest(identity | {"image_size": image_size, "channels": channels})

    def read(self, indices: np.ndarray, crops: RandomCrops | None = None, evaluation: bool = True) -> Read:
        del evaluation  # drawn at image_size: there is nothing to crop away
        keys, labels = self._keys_and_labels(np.asarray(indices, np.int64))
        images = np.empty((len(keys), *self.image_size, self.channels), np.uint8)
        chunk = max(1, _CHUNK_BYTES // (self.image_size[0] * self.image_size[1] * 4))
        for start in range(0, len(keys), chunk):
            part = slice(start, start + chunk)
            images[part] = self._draw(keys[part], labels[part])
        if crops is not None:
            images = crop_images(images, crops)
        return {"image": images, "label": labels}, np.zeros(len(keys), bool)

    def _keys_and_labels(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the random key and the class of each example. # (N,) -> uint64 (N,), int32 (N,)"""
        ends = np.cumsum([span.stop - span.start for span in self.spans])
        which = np.searchsorted(ends, indices, side="right")
        starts = np.array([span.start for span in self.spans]) - np.concatenate([[0], ends[:-1]])
        base = np.array([_BASE_SPLITS.index(span.name) for span in self.spans], np.uint64)[which]
        position = indices + starts[which]
        salt = _scramble(np.array([self.seed % 2**63], np.uint64))
        keys = _scramble(_scramble(position.astype(np.uint64) + salt) ^ (base + np.uint64(1)))
        return keys, (position % self.num_classes).astype(np.int32)

    def _draw(self, keys: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Draws images. # uint64 (N,), int32 (N,) -> uint8 (N, H, W, C)"""
        draws = [_uniform(keys, number)[:, None, None] for number in range(_NUM_DRAWS)]  # each (N, 1, 1)
        height, width = self.image_size
        y = np.linspace(-1, 1, height, dtype=np.float32)[None, :, None]
        x = np.linspace(-1, 1, width, dtype=np.float32)[None, None, :]
        # Background: a soft wave, so that there is something to reconstruct besides the shape.
        wave = np.sin((2 + 4 * draws[0]) * x + 6 * draws[1]) * np.sin(
            (2 + 4 * draws[2]) * y + 6 * draws[3]
        )  # (N, H, W)
        ground = 0.25 + 0.12 * wave
        radius = 0.4 + 0.25 * draws[4]
        angle = 0.6 * (draws[5] - 0.5)
        shifted_x, shifted_y = x - 0.5 * (draws[6] - 0.5), y - 0.5 * (draws[7] - 0.5)
        u = (np.cos(angle) * shifted_x + np.sin(angle) * shifted_y) / radius
        v = (np.cos(angle) * shifted_y - np.sin(angle) * shifted_x) / radius
        cover = np.empty(wave.shape, np.float32)
        for shape in range(len(SHAPES)):
            rows = np.flatnonzero(labels % len(SHAPES) == shape)
            if not len(rows):
                continue
            edge = np.float32(min(height, width) / 2) * radius[rows]  # shape units to pixels: one soft pixel at the rim
            cover[rows] = np.clip(0.5 - _distance(shape, u[rows], v[rows]) * edge, 0, 1)
        brightness = 0.85 + 0.15 * draws[8]
        colours = self._colours()[labels // len(SHAPES)] * (255 * brightness[:, :, 0])  # (N, C)
        uncovered = 255 * ground * (1 - cover) + 0.5  # the half makes the cast below round
        images = np.empty((*cover.shape, self.channels), np.uint8)
        for channel in range(self.channels):
            images[..., channel] = uncovered + cover * colours[:, channel, None, None]
        return images

    def _colours(self) -> np.ndarray:
        """Returns one colour for every len(SHAPES) classes, all brighter than the ground. # float32 (colours, C)"""
        count = -(-self.num_classes // len(SHAPES))
        if self.channels == 1:
            return np.linspace(1, 0.55, count, dtype=np.float32)[:, None]
        return np.array([colorsys.hls_to_rgb(i / count, 0.6, 0.9) for i in range(count)], np.float32)


def _distance(shape: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Returns the distance from the shape's rim, negative inside, in units of its radius. # (n, H, W) -> (n, H, W)"""
    if shape == 0:
        return np.hypot(u, v) - 1
    if shape == 1:
        return np.maximum(np.abs(u), np.abs(v)) - 0.85
    if shape == 2:
        return np.maximum(0.87 * np.abs(u) - 0.5 * v, v) - 0.55
    if shape == 3:
        return np.abs(np.hypot(u, v) - 0.75) - 0.25
    upright = np.maximum(np.abs(u) - 0.3, np.abs(v) - 1)
    return np.minimum(upright, np.maximum(np.abs(v) - 0.3, np.abs(u) - 1))


def _scramble(words: np.ndarray) -> np.ndarray:
    """Applies splitmix64 (Steele et al. 2014), a bijection of 64-bit words whose output passes for random."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _uniform(keys: np.ndarray, number: int) -> np.ndarray:
    """Returns the number-th uniform of each key, float32 in [0, 1). # (N,) -> (N,)"""
    return (_scramble(keys + np.uint64(number + 1)) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
