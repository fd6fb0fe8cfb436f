"""The optimizer and the state that it updates."""

from mae_dist.optim.optimizer import register

__all__ = ["register"]
