"""Quick start: the 8x8 handwritten digits of scikit-learn; about a minute on two cores, no download.

bash launch/local.sh
"""

from ml_collections import ConfigDict

import mae_dist


def get_config() -> ConfigDict:
    """Returns a small autoencoder with 2x2 patches, 16 per image."""
    config = mae_dist.default_config()
    config.name = "quickstart"
    config.total_epochs = 120.0
    config.global_batch_size = 128
    config.log_every_steps = 50
    config.model.image_size = (8, 8)
    config.model.channels = 1
    config.model.patch_size = (2, 2)
    config.model.embed_dim = 64
    config.model.depth = 3
    config.model.decoder_embed_dim = 64
    config.model.mask_ratio = 0.5
    config.optim.base_lr = 4e-3
    config.optim.warmup_epochs = 10.0
    config.data.source = "digits"
    config.data.name = "digits"
    config.data.train_split = "train[:90%]"
    config.data.val_split = "train[90%:]"
    config.data.mean = (0.3,)  # of the digits' pixels; the loss is then in units of their variance
    config.data.std = (0.375,)
    config.eval.every_epochs = 10.0
    config.online.every_epochs = 20.0
    config.pictures.every_epochs = 40.0
    config.checkpoint.every_steps = 200
    return config
