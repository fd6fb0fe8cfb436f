"""The paper's ViT-L/16 (1024d/24 blocks) on ImageNet-1k, pretrained.

python -m mae_dist.main --config configs/imagenet_vit_l16.py
"""

from ml_collections import ConfigDict

from configs import imagenet_vit_b16


def get_config() -> ConfigDict:
    """The paper's ViT-L/16."""
    config = imagenet_vit_b16.get_config()
    config.name = "imagenet_vit_l16"
    config.model.embed_dim = 1024
    config.model.depth = 24
    config.model.num_heads = 16
    return config
