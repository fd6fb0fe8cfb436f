"""Sizes of data sets that are not on this machine, for planning."""

import numpy as np

from mae_dist.data.dataset import Dataset, Read
from mae_dist.data.splits import parse_split
from mae_dist.data.transforms import RandomCrops
from mae_dist.errors import ConfigError

# Name of a TFDS data set -> examples of each split, and classes.
SIZES: dict[str, tuple[dict[str, int], int]] = {
    "cifar10": ({"train": 50_000, "test": 10_000}, 10),
    "cifar100": ({"train": 50_000, "test": 10_000}, 100),
    "imagenet2012": ({"train": 1_281_167, "validation": 50_000, "test": 100_000}, 1000),
}


def known_sizes(name: str) -> tuple[dict[str, int], int] | None:
    """Returns the entry of `SIZES` for a name with or without a version (`imagenet2012:5.1.0`), if there is one."""
    return SIZES.get(name.partition(":")[0])


class DescribedDataset(Dataset):
    """The description of a split, without its images."""

    def __init__(self, name: str, split: str):
        known = known_sizes(name)
        if known is None:
            raise ConfigError(
                f"data.name={name!r}: neither is it in data.data_dir nor is its size known here; known are "
                f"{', '.join(SIZES)}; prepare it, or plan with one of like size"
            )
        sizes, self.num_classes = known
        self.num_examples = sum(span.stop - span.start for span in parse_split(split, sizes))
        self.class_names = tuple(str(label) for label in range(self.num_classes))
        self.fingerprint, self.in_memory = f"described {name} {split}", True

    def read(self, indices: np.ndarray, crops: RandomCrops | None = None, evaluation: bool = True) -> Read:
        raise AssertionError("a described data set has no images")
