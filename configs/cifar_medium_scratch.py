"""Supervised baseline of cifar_medium_finetune.py: the same recipe from random weights.

python -m mae_dist.main --config configs/cifar_medium_scratch.py
"""

from ml_collections import ConfigDict

from configs import cifar_medium, recipes


def get_config() -> ConfigDict:
    """See recipes.scratch."""
    return recipes.scratch(cifar_medium.get_config())
