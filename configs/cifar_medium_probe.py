"""Accuracy of the frozen encoder of cifar_medium.py.

python -m mae_dist.main --config configs/cifar_medium_probe.py
"""

from ml_collections import ConfigDict

from configs import cifar_medium, recipes


def get_config() -> ConfigDict:
    """See recipes.probe."""
    return recipes.probe(cifar_medium.get_config())
