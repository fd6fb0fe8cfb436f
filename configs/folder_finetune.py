"""Fine-tunes the encoder of folder.py on images with labels: a directory per class, or a table.

python -m mae_dist.main --config configs/folder_finetune.py --config.data.data_dir=/my/images
python -m mae_dist.main --config configs/folder_finetune.py --config.data.data_dir=/my/images --config.data.labels=csv:F

The model and the sizes are given as to folder.py and are those of its run, `--config.init_from` (runs/folder).
"""

from ml_collections import ConfigDict

import mae_dist
from mae_dist.config import recipes


def get_config(choice: str = "tiny,96,8") -> ConfigDict:
    """Returns the config of the pretraining, changed by `recipes.finetune`."""
    config = recipes.finetune(mae_dist.get_config(f"folder:{choice}"))
    config.data.labels = "folders"
    return config
