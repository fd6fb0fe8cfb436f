"""The paper's ViT-B/16 (768d/12 blocks) on ImageNet-1k, pretrained.

python -m mae_dist.main --config configs/imagenet_vit_b16.py
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """The paper's pretraining: batch 4096, base lr 1.5e-4, 40 of 800 epochs of warm-up, normalised pixels."""
    config = default.get_config()
    config.name = "imagenet_vit_b16"
    config.total_epochs = 800.0
    config.global_batch_size = 4096
    config.model.image_size = (224, 224)
    config.model.patch_size = (16, 16)
    config.model.embed_dim = 768
    config.model.depth = 12
    config.model.num_heads = 12
    config.model.mlp_ratio = 4.0
    config.model.decoder_embed_dim = 512
    config.model.decoder_depth = 8
    config.model.decoder_num_heads = 16
    config.model.decoder_mlp_ratio = 4.0
    config.model.dtype = "bfloat16"
    config.model.scan = True
    config.pretrain.norm_pix_loss = True
    config.optim.base_lr = 1.5e-4
    config.optim.warmup_epochs = 40.0
    config.data.name = "imagenet2012"
    config.data.train_split = "train"
    config.data.val_split = "validation"
    config.data.test_split = ""
    config.data.augment = "crop_flip"
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    return config
