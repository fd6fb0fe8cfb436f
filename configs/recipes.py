"""Turns a pretraining config into the config that belongs to it: `mae_dist/config/recipes.py`."""

from mae_dist.config.recipes import finetune, imagenet_finetune, imagenet_linear, probe, scratch

__all__ = ["finetune", "imagenet_finetune", "imagenet_linear", "probe", "scratch"]
