"""Smoke test: procedural shapes, a tiny model, twenty steps; takes seconds.

python -m mae_dist.main --config configs/smoke.py
"""

from ml_collections import ConfigDict

import mae_dist


def get_config() -> ConfigDict:
    """Returns a config that does everything a real run does, as small as possible."""
    config = mae_dist.default_config()
    config.name = "smoke"
    config.total_steps = 20
    config.global_batch_size = 32
    config.log_every_steps = 5
    config.model.image_size = (16, 16)
    config.model.embed_dim = 32
    config.model.depth = 2
    config.model.decoder_embed_dim = 32
    config.model.decoder_num_heads = 2
    config.data.source = "synthetic"
    config.data.name = "shapes"
    config.data.num_examples = 512
    config.eval.every_steps = 10
    config.online.every_epochs = 0.0  # compiles another function for a second
    config.pictures.every_steps = 20
    config.checkpoint.every_steps = 5
    return config
