"""Sources of examples → grain dataset → host batch → global array."""

from mae_dist.augment import RandAugment
from mae_dist.data.batches import Batches, eval_batches, num_readers, train_batches
from mae_dist.data.dataset import ArrayDataset, Dataset, FirstExamples
from mae_dist.data.described import DescribedDataset, known_sizes
from mae_dist.data.placement import local_rows, to_global
from mae_dist.data.sources import open_split
from mae_dist.data.tfds_source import is_prepared
from mae_dist.transforms import Augment

__all__ = [
    "ArrayDataset",
    "Augment",
    "Batches",
    "Dataset",
    "DescribedDataset",
    "FirstExamples",
    "RandAugment",
    "eval_batches",
    "is_prepared",
    "known_sizes",
    "local_rows",
    "num_readers",
    "open_split",
    "to_global",
    "train_batches",
]
