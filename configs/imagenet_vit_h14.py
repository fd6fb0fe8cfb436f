"""The paper's ViT-H/14 (1280d/32 blocks) on ImageNet-1k, pretrained.

python -m mae_dist.main --config configs/imagenet_vit_h14.py
"""

from ml_collections import ConfigDict

from configs import imagenet_vit_b16


def get_config() -> ConfigDict:
    """The paper's ViT-H/14."""
    config = imagenet_vit_b16.get_config()
    config.name = "imagenet_vit_h14"
    config.model.patch_size = (14, 14)
    config.model.embed_dim = 1280
    config.model.depth = 32
    config.model.num_heads = 16
    return config
