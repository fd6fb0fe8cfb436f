"""Accuracy of the frozen encoder of cifar_medium.py.

python -m mae_dist.main --config configs/cifar_medium_probe.py
"""

from ml_collections import ConfigDict

import mae_dist
from mae_dist.config import recipes


def get_config() -> ConfigDict:
    """See recipes.probe."""
    return recipes.probe(mae_dist.get_config("cifar_medium"))
