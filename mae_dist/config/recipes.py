"""Turns a pretraining config into the probe, fine-tuning or from-scratch config that belongs to it."""

from ml_collections import ConfigDict


def probe(config: ConfigDict) -> ConfigDict:
    """Sets the report's probe: frozen encoder, head with one hidden layer of 128, 50 epochs, no augmentation."""
    config.task = "probe"
    config.init_from = f"runs/{config.name}"
    config.name = f"{config.name}_probe"
    config.total_epochs = 50.0
    config.global_batch_size = 64
    config.log_every_steps = 500
    config.classify.head = "mlp"
    config.optim.base_lr = 4e-3  # 1e-3 at batch 64
    config.optim.b2 = 0.999
    config.optim.warmup_epochs = 5.0
    config.optim.weight_decay = 0.0
    config.data.augment = "none"
    config.eval.batch_size = 512
    config.eval.train_at_end = True
    config.checkpoint.every_steps = 5000
    return config


def finetune(config: ConfigDict) -> ConfigDict:
    """Sets fine-tuning of all weights as DeiT and MAE do it, for a small model.

    Crops and flips; mixup 0.8, cutmix 1 and label smoothing 0.1; layer decay 0.75, drop path 0.1; averaged weights.
    """
    config.task = "finetune"
    config.init_from = f"runs/{config.name}"
    config.name = f"{config.name}_finetune"
    config.total_epochs = 100.0
    config.ema_decay = 0.999  # at batch 256 over about six epochs; in a short run over its last tenth
    config.classify.norm_after_pool = True  # as the paper fine-tunes: mean over patches, then a LayerNorm
    config.classify.label_smoothing = 0.1
    config.classify.mixup = 0.8
    config.classify.cutmix = 1.0
    config.classify.mix_prob = 0.5  # not all: few blocks and few epochs leave little to regularise
    config.model.drop_path = 0.1
    config.optim.b2 = 0.999
    config.optim.layer_decay = 0.75
    config.optim.warmup_epochs = 5.0
    config.data.augment = "crop_flip"
    config.data.crop_scale = (0.6, 1.0)
    return config


def scratch(config: ConfigDict) -> ConfigDict:
    """Sets the supervised baseline: the fine-tuning recipe from random weights, without layer decay."""
    name = config.name
    config = finetune(config)
    config.name = f"{name}_scratch"
    config.init_from = ""
    config.optim.layer_decay = 1.0
    return config


def pixio(config: ConfigDict) -> ConfigDict:
    """Sets what Pixio (arXiv 2512.15715) changes of MAE's pretraining, for patches of 16 pixels.

    Images of 256 pixels, squares of 4x4 patches removed as one, eight class tokens whose mean is the feature, and a
    decoder of 32 blocks of width 512. The paper trains on two billion images of the web.
    """
    config.name = f"{config.name}_pixio"
    config.model.image_size = (256, 256)
    config.model.mask_block = 4
    config.model.cls_tokens = 8
    config.model.decoder_embed_dim = 512
    config.model.decoder_depth = 32
    config.model.decoder_num_heads = 16
    config.classify.pool = "cls"
    return config


def imagenet_finetune(
    config: ConfigDict, *, epochs: float, base_lr: float, layer_decay: float, drop_path: float
) -> ConfigDict:
    """Sets the paper's fine-tuning on ImageNet-1k (table 9 and code); the arguments differ between model sizes."""
    config.task = "finetune"
    config.init_from = f"runs/{config.name}"
    config.name = f"{config.name}_finetune"
    config.total_epochs = epochs
    config.global_batch_size = 1024
    config.classify.head = "linear"
    config.classify.pool = "gap"
    config.classify.norm_after_pool = True
    config.classify.label_smoothing = 0.1
    config.classify.mixup = 0.8
    config.classify.cutmix = 1.0
    config.classify.erase_prob = 0.25
    config.model.drop_path = drop_path
    config.optim.name = "adamw"
    config.optim.base_lr = base_lr
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.weight_decay = 0.05
    config.optim.layer_decay = layer_decay
    config.optim.warmup_epochs = 5.0
    config.optim.final_lr = 1e-6
    config.data.augment = "crop_flip"
    config.data.crop_scale = (0.08, 1.0)
    config.data.randaug_magnitude = 9.0
    config.data.randaug_std = 0.5
    config.data.randaug_layers = 2
    return config


def imagenet_linear(config: ConfigDict) -> ConfigDict:
    """Sets the paper's linear probe on ImageNet-1k (table 10 and code), the same for all model sizes."""
    config.task = "probe"
    config.init_from = f"runs/{config.name}"
    config.name = f"{config.name}_linear"
    config.total_epochs = 90.0
    config.global_batch_size = 16384
    config.log_every_steps = 10
    config.classify.head = "linear"
    config.classify.pool = "cls"
    config.classify.batch_norm = True
    config.optim.name = "lars"
    config.optim.base_lr = 0.1
    config.optim.momentum = 0.9
    config.optim.weight_decay = 0.0
    config.optim.warmup_epochs = 10.0
    config.data.augment = "crop_flip"
    config.data.crop_scale = (0.08, 1.0)
    config.eval.batch_size = 1024
    return config
