"""Supervised baseline of cifar_vit_tiny_finetune.py: the same recipe from random weights.

python -m mae_dist.main --config configs/cifar_vit_tiny_scratch.py
"""

from ml_collections import ConfigDict

import mae_dist
from mae_dist.config import recipes


def get_config() -> ConfigDict:
    """Returns the config of the pretraining, changed by `recipes.scratch`."""
    return recipes.scratch(mae_dist.get_config("cifar_vit_tiny"))
