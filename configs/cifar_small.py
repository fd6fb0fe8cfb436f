"""The student report's small model on CIFAR-10: encoder 128d/3 blocks/4 heads, decoder 64d/1/4, patch 4, 100 epochs.

python -m mae_dist.main --config configs/cifar_small.py
"""

from ml_collections import ConfigDict

import mae_dist


def get_config() -> ConfigDict:
    """Returns the small model of the report's Table 1."""
    config = mae_dist.default_config()
    config.name = "cifar_small"
    config.model.pos_embed = "sincos1d"
    config.model.layer_scale_init = 0.1
    return config
