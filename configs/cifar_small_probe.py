"""Accuracy of the frozen encoder of cifar_small.py.

python -m mae_dist.main --config configs/cifar_small_probe.py
"""

from ml_collections import ConfigDict

from configs import cifar_small, recipes


def get_config() -> ConfigDict:
    """See recipes.probe."""
    return recipes.probe(cifar_small.get_config())
