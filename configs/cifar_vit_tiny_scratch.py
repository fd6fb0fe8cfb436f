"""Supervised baseline of cifar_vit_tiny_finetune.py: the same recipe from random weights.

python -m mae_dist.main --config configs/cifar_vit_tiny_scratch.py
"""

from ml_collections import ConfigDict

from configs import cifar_vit_tiny, recipes


def get_config() -> ConfigDict:
    """See recipes.scratch."""
    return recipes.scratch(cifar_vit_tiny.get_config())
