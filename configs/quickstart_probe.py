"""Trains an MLP head on the features of the quick start's frozen encoder, which measures its accuracy.

python -m mae_dist.main --config configs/quickstart_probe.py
"""

from ml_collections import ConfigDict

import mae_dist
from mae_dist.config import recipes


def get_config() -> ConfigDict:
    """Returns the config of `recipes.probe` with more epochs, because an epoch of 1,294 images is short."""
    config = recipes.probe(mae_dist.get_config("quickstart"))
    config.total_epochs = 100.0
    config.optim.base_lr = 8e-3
    config.log_every_steps = 200
    config.eval.every_epochs = 10.0
    config.checkpoint.every_steps = 1000
    return config
