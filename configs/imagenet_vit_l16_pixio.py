"""ViT-L/16 pretrained on ImageNet-1k with Pixio's changes of MAE: larger masks, class tokens, a deep decoder.

Not run here. The deep decoder costs more than the encoder does: `plan` says how much for your devices.

python -m mae_dist.main --config configs/imagenet_vit_l16_pixio.py
python -m mae_dist.convert --source runs/imagenet_vit_l16_pixio --out pixio_l16 --to pixio --encoder_only
"""

from ml_collections import ConfigDict

import mae_dist
from mae_dist.config import recipes


def get_config() -> ConfigDict:
    """Returns the config of the paper's ViT-L/16, changed by `recipes.pixio`."""
    return recipes.pixio(mae_dist.get_config("imagenet_vit_l16"))
