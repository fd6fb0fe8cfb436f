"""One door to every source of examples."""

from mae_dist.data.dataset import Dataset
from mae_dist.data.sources import SOURCES, register_source
from mae_dist.data.sources.cache import cache_root, decode_once, fits_in_memory
from mae_dist.data.sources.digits import open_digits
from mae_dist.data.sources.staging import Staging
from mae_dist.data.sources.synthetic import open_synthetic
from mae_dist.data.sources.tfds import open_tfds
from mae_dist.errors import ConfigError
from mae_dist.registry import named_arguments


def open_split(
    split: str,
    *,
    image_size: tuple[int, int],
    channels: int,
    source: str,
    name: str,
    data_dir: str,
    cache: str,
    cache_dir: str,
    stage: bool,
    max_bad_share: float,
    num_examples: int,
    num_classes: int,
    seed: int = 0,
) -> Dataset:
    """Opens a split of a dataset.

    Args:
      split: a TFDS split expression, for every source: "train", "train[:80%]", "train+test", "validation[:100]".
      image_size: (height, width) of the images given out.
      channels: 1 grey, 3 RGB (4 where TFDS images have an alpha channel).
      source: the name of a registered one: "tfds", "digits", "synthetic".
      name: the dataset's name, for "tfds".
      data_dir: TFDS data directory, for "tfds", may be gs://…; "" is TFDS's default.
      cache: "memory" decodes once and keeps uint8 images, for images of varying size the short side resized and the
        centre cropped, so that random crops see no more than that; it is refused where evaluation has a crop of its
        own (images resized to 64 pixels or more). "stream" decodes on every read. "auto" is "memory" for images of one
        size and up to 2 GiB decoded, where it is not refused, else "stream". Synthetic images are drawn on every read
        unless "memory"; digits are always in memory.
      cache_dir: where decoded images and copied record files are kept for the next start; "" is ~/.cache/mae_dist.
      stage: whether the record files that the split needs are copied there and read there; in a bucket they always are.
      max_bad_share: largest share of records that may be left out because they do not decode.
      num_examples: size of the base split "train", for "synthetic"; "test" has a fifth.
      num_classes: for "synthetic".
      seed: for "synthetic".

    Returns:
      A dataset of images uint8 (N, *image_size, channels) and labels int32 (N,).

    Raises:
      ConfigError: an argument that cannot work.
      DataFault: files that are missing, damaged or cannot be downloaded.
    """
    image_size = (int(image_size[0]), int(image_size[1]))
    if min(image_size) < 1 or not 0 <= max_bad_share < 1:
        raise ConfigError(
            f"model.image_size={image_size} and data.max_bad_share={max_bad_share}: the size must be at least "
            "1 x 1 pixel and the share in [0, 1)"
        )
    offered = {
        "image_size": image_size,
        "channels": channels,
        "name": name,
        "data_dir": data_dir,
        "cache": cache,
        "cache_dir": cache_dir,
        "stage": stage,
        "max_bad_share": max_bad_share,
        "num_examples": num_examples,
        "num_classes": num_classes,
        "seed": seed,
    }
    function = SOURCES.get(source)
    return function(split, **named_arguments(function, offered, f"the function of data.source={source!r}"))


@register_source("tfds")
def _open_tfds(
    split: str,
    *,
    image_size: tuple[int, int],
    channels: int,
    name: str,
    data_dir: str,
    cache: str,
    cache_dir: str,
    stage: bool,
    max_bad_share: float,
) -> Dataset:
    if stage and not data_dir:
        raise ConfigError(
            "data.stage copies data.data_dir, which is empty; name the directory or bucket that is to be copied"
        )
    staging = Staging(data_dir, cache_root(cache_dir)) if stage or "://" in data_dir else None
    dataset = open_tfds(name, split, data_dir, image_size=image_size, channels=channels, staging=staging)
    if cache == "memory" or (cache == "auto" and fits_in_memory(dataset)):
        return decode_once(dataset, cache_dir=cache_dir, max_bad_share=max_bad_share)
    dataset.max_bad_share = max_bad_share
    return dataset


register_source("digits")(open_digits)


@register_source("synthetic")
def _open_synthetic(
    split: str,
    *,
    image_size: tuple[int, int],
    channels: int,
    num_examples: int,
    num_classes: int,
    seed: int,
    cache: str,
) -> Dataset:
    return open_synthetic(
        split,
        image_size=image_size,
        channels=channels,
        num_examples=num_examples,
        num_classes=num_classes,
        seed=seed,
        in_memory=cache == "memory",
    )
