"""Turns a pretraining config into the probe, fine-tuning or from-scratch config that belongs to it."""

from ml_collections import ConfigDict


def probe(config: ConfigDict) -> ConfigDict:
    """The report's probe: frozen encoder, head with one hidden layer of 128, 50 epochs, batch 64, no augmentation."""
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
    config.checkpoint.every_steps = 5000
    return config


def finetune(config: ConfigDict) -> ConfigDict:
    """All weights trained on from the pretrained encoder: crops and flips, label smoothing 0.1, drop path 0.1."""
    config.task = "finetune"
    config.init_from = f"runs/{config.name}"
    config.name = f"{config.name}_finetune"
    config.total_epochs = 100.0
    config.classify.norm_after_pool = True  # as the paper fine-tunes: mean over patches, then a LayerNorm
    config.classify.label_smoothing = 0.1
    config.model.drop_path = 0.1
    config.optim.b2 = 0.999
    config.optim.warmup_epochs = 5.0
    config.data.augment = "crop_flip"
    config.data.crop_scale = (0.6, 1.0)
    return config


def scratch(config: ConfigDict) -> ConfigDict:
    """The supervised baseline: the fine-tuning recipe from random weights."""
    name = config.name
    config = finetune(config)
    config.name = f"{name}_scratch"
    config.init_from = ""
    return config
