"""Opens a split of any source."""

from typing import Any

from mae_dist.data.dataset import Dataset
from mae_dist.data.sources import SOURCES, digits, synthetic, tfds
from mae_dist.registry import named_arguments

BUILT_IN = (digits, synthetic, tfds)  # importing them registers their sources


def open_split(split: str, *, source: str, image_size: tuple[int, int], **fields: Any) -> Dataset:
    """Opens a split of a dataset.

    Args:
      split: a TFDS split expression, for every source: "train", "train[:80%]", "train+test", "validation[:100]".
      source: the name of a registered one: "tfds", "digits", "synthetic".
      image_size: (height, width) of the images given out.
      fields: `channels` and the other fields of `config.data`; the source gets those that it names.

    Returns:
      A dataset of images uint8 (N, *image_size, channels) and labels int32 (N,).

    Raises:
      ConfigError: an argument that cannot work.
      DataFault: files that are missing, corrupted or cannot be downloaded.
    """
    offered = {"image_size": tuple(image_size), **fields}
    function = SOURCES.get(source)
    return function(split, **named_arguments(function, offered, f"the function of data.source={source!r}"))
