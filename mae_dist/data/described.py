"""Data sets that are not here: how many examples their splits have, for planning."""

from pathlib import Path

import numpy as np

from mae_dist.data.dataset import Dataset
from mae_dist.data.splits import parse_split
from mae_dist.errors import ConfigError
from mae_dist.transforms import RandomCrops

# Name of a TFDS data set -> examples of each split, and classes.
SIZES: dict[str, tuple[dict[str, int], int]] = {
    "cifar10": ({"train": 50_000, "test": 10_000}, 10),
    "cifar100": ({"train": 50_000, "test": 10_000}, 100),
    "imagenet2012": ({"train": 1_281_167, "validation": 50_000, "test": 100_000}, 1000),
}


class DescribedDataset(Dataset):
    """The description of a split, without its images."""

    def __init__(self, name: str, split: str):
        if name not in SIZES:
            raise ConfigError(
                f"data.name={name!r}: neither is it in data.data_dir nor is its size known here; known are "
                f"{', '.join(SIZES)}; prepare it, or plan with one of like size"
            )
        sizes, self.num_classes = SIZES[name]
        self.num_examples = sum(span.stop - span.start for span in parse_split(split, sizes))
        self.class_names = tuple(str(label) for label in range(self.num_classes))
        self.fingerprint, self.in_memory = f"described {name} {split}", True

    def read(
        self, indices: np.ndarray, crops: RandomCrops | None = None, evaluation: bool = True
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        raise AssertionError("a described data set has no images")


def is_prepared(name: str, data_dir: str) -> bool:
    """Whether all of a TFDS data set lies in `data_dir`, "" being TFDS's default; of a bucket that is not asked."""
    import tensorflow_datasets as tfds

    if "://" in data_dir:
        return False
    root = str(Path(data_dir).expanduser()) if data_dir else None
    try:
        return tfds.builder(name, data_dir=root, try_gcs=False).is_prepared()
    except (tfds.core.DatasetNotFoundError, AssertionError, ValueError, OSError):
        return False
