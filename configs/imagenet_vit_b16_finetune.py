r"""The paper's fine-tuning of ViT-B/16 on ImageNet-1k: 100 epochs (He et al. 2021, table 9, and the published code).

Published top-1 with the published encoder (800 to 1600 epochs): 83.66 %. Not run here.
Meshes (batch 1024; every device holds the whole model), from the sizes, not planned:
  v5e-16      as it is: 64 images a chip
  v5e-256     as it is: 4 images a chip
  8 x H100    as it is: 128 images a device

python -m mae_dist.main --config configs/imagenet_vit_b16_finetune.py
bash launch/gcp_tpu.sh --workdir gs://B/b16_finetune --accelerator_type v5litepod-16 -- \
  --config configs/imagenet_vit_b16_finetune.py --config.init_from=gs://B/b16
"""

from ml_collections import ConfigDict

import mae_dist
from mae_dist.config import recipes


def get_config() -> ConfigDict:
    """Returns the config of the pretraining, changed by `recipes.imagenet_finetune`."""
    return recipes.imagenet_finetune(
        mae_dist.get_config("imagenet_vit_b16"), epochs=100.0, base_lr=5e-4, layer_decay=0.65, drop_path=0.1
    )
