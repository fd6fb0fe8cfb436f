"""One function that opens a split of any source."""

from typing import Any

from mae_dist.data.dataset import Dataset
from mae_dist.data.sources import SOURCES, digits, synthetic, tfds  # which register themselves
from mae_dist.errors import ConfigError
from mae_dist.registry import named_arguments

__all__ = ["digits", "open_split", "synthetic", "tfds"]


def open_split(
    split: str, *, source: str, image_size: tuple[int, int], channels: int, max_bad_share: float, **fields: Any
) -> Dataset:
    """Opens a split of a dataset.

    Args:
      split: a TFDS split expression, for every source: "train", "train[:80%]", "train+test", "validation[:100]".
      source: the name of a registered one: "tfds", "digits", "synthetic".
      image_size: (height, width) of the images given out.
      channels: 1 grey, 3 RGB (4 where the images have an alpha channel).
      max_bad_share: largest share of records that may be left out because they do not decode.
      fields: the other fields of `config.data`; the source gets those that it names.

    Returns:
      A dataset of images uint8 (N, *image_size, channels) and labels int32 (N,).

    Raises:
      ConfigError: an argument that cannot work.
      DataFault: files that are missing, corrupted or cannot be downloaded.
    """
    image_size = (int(image_size[0]), int(image_size[1]))
    if min(image_size) < 1 or not 0 <= max_bad_share < 1:
        raise ConfigError(
            f"model.image_size={image_size} and data.max_bad_share={max_bad_share}: the size must be at least "
            "1 x 1 pixel and the share in [0, 1)"
        )
    offered = {"image_size": image_size, "channels": channels, "max_bad_share": max_bad_share, **fields}
    function = SOURCES.get(source)
    return function(split, **named_arguments(function, offered, f"the function of data.source={source!r}"))
