r"""The paper's ViT-H/14 (1280d/32 blocks/16 heads, patch 14), pretrained on ImageNet-1k: He et al. 2021, table 8.

Published top-1 of its encoder after 800 to 1600 epochs: 86.93 % fine-tuned, 77.2 % by a linear probe. Not run here.
Meshes (batch 4096), from `python -m mae_dist.plan`:
  v5e-16      --config.optim.shard_state=True --config.model.remat=blocks, 10.4 of 15.75 GiB a chip (a whole state per
              chip: 17.1, too much), or --config.mesh.fsdp=16
  v5e-256     --config.model.remat=blocks --config.mesh.fsdp=16 (mesh.data=16; not planned)
  8 x H100    --config.model.remat=blocks --config.mesh.fsdp=8 --config.accum_steps=2 (not planned)

python -m mae_dist.main --config configs/imagenet_vit_h14.py
bash launch/gcp_tpu.sh --workdir gs://B/h14 --accelerator_type v5litepod-256 -- \
  --config configs/imagenet_vit_h14.py --config.model.remat=blocks --config.mesh.fsdp=16
"""

from ml_collections import ConfigDict

import mae_dist


def get_config() -> ConfigDict:
    """Returns the pretraining of the paper's ViT-H/14."""
    config = mae_dist.get_config("imagenet_vit_b16")
    config.name = "imagenet_vit_h14"
    config.model.patch_size = (14, 14)
    config.model.embed_dim = 1280
    config.model.depth = 32
    config.model.num_heads = 16
    return config
