"""Fine-tunes the encoder of cifar_vit_tiny.py, which measures its accuracy.

python -m mae_dist.main --config configs/cifar_vit_tiny_finetune.py
"""

from ml_collections import ConfigDict

import mae_dist
from mae_dist.config import recipes


def get_config() -> ConfigDict:
    """Returns the config of the pretraining, changed by `recipes.finetune`."""
    return recipes.finetune(mae_dist.get_config("cifar_vit_tiny"))
