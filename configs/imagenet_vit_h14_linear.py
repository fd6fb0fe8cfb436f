"""The paper's linear probe of ViT-H/14 on ImageNet-1k: 90 epochs (He et al. 2021, table 10, and the published code).

Expected: 77.2 % top-1, the published code's from its own encoder (800 to 1600 epochs); not run here.
Mesh: every device holds the whole encoder (the default, mesh.data=-1): it is frozen and has no moments.

python -m mae_dist.main --config configs/imagenet_vit_h14_linear.py
"""

from ml_collections import ConfigDict

from configs import imagenet_vit_h14, recipes


def get_config() -> ConfigDict:
    """See recipes.imagenet_linear."""
    return recipes.imagenet_linear(imagenet_vit_h14.get_config())
