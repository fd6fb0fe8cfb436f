"""Experiment trackers: Weights & Biases, MLflow, Trackio, and those of users, chosen by `config.trackers`."""

from mae_dist.trackers import mlflow, trackio, wandb  # registers them; their packages are imported when they start
from mae_dist.trackers.base import TRACKERS, Run, Tracker, faults, register

__all__ = ["TRACKERS", "Run", "Tracker", "faults", "mlflow", "register", "trackio", "wandb"]
