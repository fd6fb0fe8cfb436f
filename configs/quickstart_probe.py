"""Accuracy of the quick start's frozen encoder: an MLP head on its features.

python -m mae_dist.main --config configs/quickstart_probe.py
"""

from ml_collections import ConfigDict

from configs import quickstart, recipes


def get_config() -> ConfigDict:
    """recipes.probe, for a set of 1,150 training images."""
    config = recipes.probe(quickstart.get_config())
    config.log_every_steps = 50
    config.eval.every_epochs = 10.0
    config.checkpoint.every_steps = 200
    return config
