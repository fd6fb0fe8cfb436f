"""Checkpoints: saved asynchronously, verified when they are restored."""
