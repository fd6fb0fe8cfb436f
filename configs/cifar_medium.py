"""The student report's medium model on CIFAR-10: encoder 256d/4 blocks/4 heads, decoder 128d/2/4, patch 4, 100 epochs.

python -m mae_dist.main --config configs/cifar_medium.py
"""

from ml_collections import ConfigDict

import mae_dist


def get_config() -> ConfigDict:
    """Returns the medium model of the report's Table 1."""
    config = mae_dist.get_config("cifar_small")
    config.name = "cifar_medium"
    config.model.embed_dim = 256
    config.model.depth = 4
    config.model.decoder_embed_dim = 128
    config.model.decoder_depth = 2
    return config
