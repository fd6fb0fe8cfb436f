"""Supervised baseline of cifar_small_finetune.py: the same recipe from random weights.

python -m mae_dist.main --config configs/cifar_small_scratch.py
"""

from ml_collections import ConfigDict

from configs import cifar_small, recipes


def get_config() -> ConfigDict:
    """See recipes.scratch."""
    return recipes.scratch(cifar_small.get_config())
