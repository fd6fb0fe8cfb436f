"""Re-exports `mae_dist/config/recipes.py`, which turns a pretraining's config into those of what follows it."""

from mae_dist.config.recipes import finetune, imagenet_finetune, imagenet_linear, probe, scratch

__all__ = ["finetune", "imagenet_finetune", "imagenet_linear", "probe", "scratch"]
