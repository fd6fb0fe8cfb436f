"""Accuracy of the encoder of cifar_vit_tiny.py, fine-tuned.

python -m mae_dist.main --config configs/cifar_vit_tiny_finetune.py
"""

from ml_collections import ConfigDict

from configs import cifar_vit_tiny, recipes


def get_config() -> ConfigDict:
    """See recipes.finetune."""
    return recipes.finetune(cifar_vit_tiny.get_config())
