"""Sources of examples → grain dataset → host batch → global array."""

from mae_dist.data.batches import Batches, eval_batches, num_readers, train_batches
from mae_dist.data.dataset import ArrayDataset, Dataset, FirstExamples
from mae_dist.data.placement import local_rows, to_global
from mae_dist.data.randaugment import RandAugment
from mae_dist.data.sources import SOURCES, register_source
from mae_dist.data.sources.described import DescribedDataset, known_sizes
from mae_dist.data.sources.open_split import open_split
from mae_dist.data.sources.tfds import is_prepared
from mae_dist.data.transforms import AUGMENTATIONS, register_augmentation

__all__ = [
    "AUGMENTATIONS",
    "SOURCES",
    "ArrayDataset",
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
    "register_augmentation",
    "register_source",
    "to_global",
    "train_batches",
]
