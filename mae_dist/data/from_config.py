"""The splits and batches that a config describes."""

import dataclasses
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from mae_dist.data import Dataset, RandAugment, batches, open_split
from mae_dist.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Data:
    """The splits of a run; None where a config leaves one empty."""

    train: Dataset
    val: Dataset | None
    test: Dataset | None


def train_batches(config: ConfigDict, dataset: Dataset, *, start_step: int, total_steps: int, rows: Any) -> Any:
    """Iterates over `rows` of the batches of steps start_step .. total_steps - 1, as a config has them made."""
    options = config.data
    fill = tuple(min(255, max(0, round(255 * value))) for value in options.mean)  # as timm
    return batches.train_batches(
        dataset,
        augment=options.augment,
        crop_scale=tuple(options.crop_scale),
        randaugment=RandAugment(options.randaug_layers, options.randaug_magnitude, options.randaug_std, fill)
        if options.randaug_magnitude
        else None,
        repeats=options.repeats,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        start_step=start_step,
        total_steps=total_steps,
        rows=rows,
        num_workers=options.num_workers,
    )


def open_data(config: ConfigDict, open_one: Callable[[ConfigDict, str], Dataset] | None = None) -> Data:
    """Opens the splits of `config.data` by `open_one`, or `open_dataset`, which downloads what is not there yet."""
    if not config.data.train_split:
        raise ConfigError("data.train_split is empty; name a split, as 'train' or 'train[:80%]'")
    splits = [config.data[f"{name}_split"] for name in ("train", "val", "test")]
    train, val, test = ((open_one or open_dataset)(config, split) if split else None for split in splits)
    assert train is not None
    return Data(train, val, test)


def open_dataset(config: ConfigDict, split: str) -> Dataset:
    """Opens a split expression of the source that `config.data` names, for the images that `config.model` takes."""
    return open_split(
        split, image_size=config.model.image_size, channels=config.model.channels, **config.data.to_dict()
    )
