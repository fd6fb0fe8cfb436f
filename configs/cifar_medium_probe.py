"""Trains a head on the frozen encoder of cifar_medium.py, which measures its accuracy.

python -m mae_dist.main --config configs/cifar_medium_probe.py
"""

from ml_collections import ConfigDict

import mae_dist
from mae_dist.config import recipes


def get_config() -> ConfigDict:
    """Returns the config of the pretraining, changed by `recipes.probe`."""
    return recipes.probe(mae_dist.get_config("cifar_medium"))
