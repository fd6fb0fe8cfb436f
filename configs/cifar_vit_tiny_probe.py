"""Accuracy of the frozen encoder of cifar_vit_tiny.py.

python -m mae_dist.main --config configs/cifar_vit_tiny_probe.py
"""

from ml_collections import ConfigDict

from configs import cifar_vit_tiny, recipes


def get_config() -> ConfigDict:
    """See recipes.probe."""
    return recipes.probe(cifar_vit_tiny.get_config())
