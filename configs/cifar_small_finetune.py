"""Accuracy of the encoder of cifar_small.py, fine-tuned.

python -m mae_dist.main --config configs/cifar_small_finetune.py
"""

from ml_collections import ConfigDict

from configs import cifar_small, recipes


def get_config() -> ConfigDict:
    """See recipes.finetune."""
    return recipes.finetune(cifar_small.get_config())
