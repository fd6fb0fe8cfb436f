"""Models with random weights, as if they were trained: in memory, or stored like converted ones."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from mae_dist.checkpoint import reader
from mae_dist.model.build import abstract_params
from mae_dist.weights import pretrained
from tests.runs import smoke_config

NUM_CLASSES = 10


def in_memory(**overrides: Any) -> pretrained.Pretrained:
    """The model of configs/smoke.py with fields set by dotted name.

    Every parameter is random, also those that start at zero or one and would hide a mistake.
    """
    config, rng = smoke_config(**overrides), np.random.default_rng(0)
    abstract = abstract_params(config, NUM_CLASSES)
    params = jax.tree.map(lambda leaf: rng.normal(scale=0.3, size=leaf.shape).astype(np.float32), abstract)

    def load(shardings: dict[str, Any]) -> dict[str, Any]:
        return {group: jax.tree.map(jax.device_put, params[group], tree) for group, tree in shardings.items()}

    return pretrained.Pretrained(config, "a test", abstract, True, load)


def save(path: Path, source: pretrained.Pretrained) -> Path:
    """Stores a model in mae_dist's own layout."""
    reader.save_params(epath.Path(path), source.config, source.load_whole(), "a test")
    return path
