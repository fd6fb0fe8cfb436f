"""Accuracy of the encoder of cifar_medium.py, fine-tuned.

python -m mae_dist.main --config configs/cifar_medium_finetune.py
"""

from ml_collections import ConfigDict

from configs import cifar_medium, recipes


def get_config() -> ConfigDict:
    """See recipes.finetune."""
    return recipes.finetune(cifar_medium.get_config())
