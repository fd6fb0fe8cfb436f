"""The splits and batches that a config describes."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from mae_dist.data import Dataset, RandAugment, batches, open_split, statistics
from mae_dist.data.batches import UNCHANGED, Stream
from mae_dist.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Data:
    """The splits of a run; None where a config leaves one empty."""

    train: Dataset
    val: Dataset | None
    test: Dataset | None


def train_batches(
    config: ConfigDict, dataset: Dataset, *, start_step: int, total_steps: int, rows: Any, stream: Stream = UNCHANGED
) -> Any:
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
        stream=stream,
    )


def complete(config: ConfigDict, data: Data) -> ConfigDict:
    """Returns a copy of a config in which the data's type, mean and standard deviation are filled in if left open."""
    config = config.copy_and_resolve_references().unlock()
    if data.train.dtype != "uint8":
        config.data.dtype = data.train.dtype
    if not config.data.mean:
        mean, std = statistics.measured(data.train, config.data.cache_dir, max_value=config.data.max_value)
        config.data.update(mean=mean, std=std)
    return config


def open_data(config: ConfigDict, open_one: Callable[[ConfigDict, str], Dataset] | None = None) -> Data:
    """Opens the splits of `config.data` by `open_one`, or `open_dataset`, which downloads what is not there yet."""
    if not config.data.train_split:
        raise ConfigError("data.train_split is empty; name a split, as 'train' or 'train[:80%]'")
    splits = [config.data[f"{name}_split"] for name in ("train", "val", "test")]
    open_one = open_one or functools.partial(open_dataset, shared={})
    train, val, test = (open_one(config, split) if split else None for split in splits)
    assert train is not None
    return Data(train, val, test)


def open_dataset(config: ConfigDict, split: str, shared: dict[str, Any] | None = None) -> Dataset:
    """Opens a split expression of the source that `config.data` names, for the images that `config.model` takes.

    `shared` is as for `open_split`: one dict for the splits of a run.
    """
    model = config.model
    fields = config.data.to_dict()
    return open_split(split, image_size=model.image_size, channels=model.channels, shared=shared, **fields)
