"""Opens a split of any source."""

from typing import Any

from mae_dist.data.dataset import Dataset
from mae_dist.data.sources import SOURCES, digits, folder, parquet, synthetic, tar, tfds
from mae_dist.registry import named_arguments

BUILT_IN = (digits, folder, parquet, synthetic, tar, tfds)  # importing them registers their sources


def open_split(
    split: str, *, source: str, image_size: tuple[int, int], shared: dict[str, Any] | None = None, **fields: Any
) -> Dataset:
    """Opens a split of a dataset.

    Args:
      split: a TFDS split expression, for every source: "train", "train[:80%]", "train+test", "validation[:100]".
      source: the name of a registered one: "tfds", "folder", "tar", "parquet", "digits", "synthetic".
      image_size: (height, width) of the images given out.
      shared: a dict in which a source may keep what the splits of one run have in common, for the next call.
      fields: `channels` and the other fields of `config.data`; the source gets those that it names.

    Returns:
      A dataset of images (N, *image_size, channels) and labels int32 (N,).

    Raises:
      ConfigError: an argument that cannot work.
      DataFault: files that are missing, corrupted or cannot be downloaded.
    """
    offered = {"image_size": tuple(image_size), "shared": {} if shared is None else shared, **fields}
    function = SOURCES.get(source)
    return function(split, **named_arguments(function, offered, f"the function of data.source={source!r}"))
