"""scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels that come with a dependency, so no download."""

import numpy as np

from mae_dist.data import draws
from mae_dist.data.dataset import ArrayDataset, digest
from mae_dist.data.sources import register_source
from mae_dist.data.splits import parse_split
from mae_dist.data.transforms import resize_images
from mae_dist.errors import ConfigError

_TRAIN_FRACTION = 0.8


@register_source("digits")
def open_digits(split: str, *, image_size: tuple[int, int], channels: int) -> ArrayDataset:
    """Opens "train" (80 %, every class in its share) and "test" (the rest), or slices of them.

    Returns:
      Images uint8 (N, *image_size, channels), always in memory.

    Raises:
      ConfigError: the split is unknown or empty, or channels is not 1 or 3.
    """
    if channels not in (1, 3):
        raise ConfigError(f"model.channels={channels}: digits are grey images; it must be 1, or 3 to repeat them")
    images, labels = _base_images()
    train_count = round(_TRAIN_FRACTION * len(labels))
    sizes = {"train": train_count, "test": len(labels) - train_count}
    offsets = {"train": 0, "test": train_count}
    spans = parse_split(split, sizes)
    chosen = np.concatenate([np.arange(s.start, s.stop) + offsets[s.name] for s in spans])
    pixels = np.repeat(resize_images(images[chosen], image_size), channels, axis=-1)
    identity = {"source": "digits", "spans": spans, "image_size": image_size, "channels": channels, "version": 1}
    return ArrayDataset({"image": pixels, "label": labels[chosen]}, num_classes=10, fingerprint=digest(identity))


def _base_images() -> tuple[np.ndarray, np.ndarray]:
    """Returns all digits, training examples first. # uint8 (1797, 8, 8, 1), int32 (1797,)"""
    from sklearn.datasets import load_digits  # a second to import, and only this source needs it

    data, target = load_digits(return_X_y=True)
    images = np.rint(data.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    labels = target.astype(np.int32)
    order = draws.permutation(0, 0, len(labels), draws.DIGITS)
    # Sorting by "how far through its own class" makes every prefix hold every class in its share.
    progress = np.empty(len(labels))
    for label in range(10):
        members = order[labels[order] == label]
        progress[members] = (np.arange(len(members)) + 0.5) / len(members)
    order = order[np.argsort(progress[order], kind="stable")]
    return images[order], labels[order]
