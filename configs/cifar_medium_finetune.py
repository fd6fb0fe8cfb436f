"""Accuracy of the encoder of cifar_medium.py, fine-tuned.

python -m mae_dist.main --config configs/cifar_medium_finetune.py
"""

from ml_collections import ConfigDict

import mae_dist
from mae_dist.config import recipes


def get_config() -> ConfigDict:
    """See recipes.finetune."""
    return recipes.finetune(mae_dist.get_config("cifar_medium"))
