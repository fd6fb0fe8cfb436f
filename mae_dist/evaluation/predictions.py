"""Features and logits of images by a classifier, and the names of its classes.

Shapes: B images, D width, Y classes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import PyTree
from ml_collections import ConfigDict

from mae_dist.cpu.microbatches import num_pieces
from mae_dist.data.from_config import open_dataset
from mae_dist.errors import ConfigError, UserError
from mae_dist.evaluation import extract
from mae_dist.evaluation.eval_step import make_eval_step
from mae_dist.model.build import functional, make_model
from mae_dist.model.hooks import PLAIN
from mae_dist.parallel.mesh import make_mesh
from mae_dist.tasks.base import Batch, scale_pixels
from mae_dist.weights import pretrained


def prepare(source: pretrained.Pretrained, config: ConfigDict) -> extract.Compute:
    """Returns a function of a dataset to float32 `mean` (B, D), the features, and `logits` (B, Y) of its batches.

    Args:
      source: a classifier.
      config: the source's, with mesh and `eval.batch_size`.

    Raises:
      ConfigError: the source has no head.
    """
    if not source.num_classes:
        raise ConfigError(
            f"{source.origin} has no classifier: it is a pretraining, or an encoder alone. Train a "
            "probe or a fine-tuning of it, with --config.task=finetune and --config.init_from, and give that workdir"
        )
    mesh = make_mesh(config.mesh.to_dict(), jax.devices())
    bind = functional(functools.partial(make_model, config, source.num_classes, PLAIN)).bind

    def forward(params: PyTree, batch: Batch) -> dict[str, jax.Array]:
        model = bind(params)
        features = model.features(scale_pixels(batch["image"], config.data), None)
        return {"mean": features.astype(jnp.float32), "logits": model.logits(features)}

    def make_step(shardings: PyTree, batch_size: int) -> jax.stages.Wrapped:
        pieces = num_pieces(config, mesh, batch_size)
        return make_eval_step(forward, mesh=mesh, params=shardings, per_example=True, pieces=pieces)

    return extract.with_step(source, source.abstract, mesh, config.eval.batch_size, make_step)


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Returns the softmax of logits. # (B, Y) -> (B, Y) float32"""
    logits = logits.astype(np.float32)
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))  # by NumPy: JAX would compile for each B
    return powers / powers.sum(axis=-1, keepdims=True)


def class_names(source: pretrained.Pretrained) -> tuple[str, ...]:
    """Returns the names of a classifier's classes: those stored with it, or of its training data, or else numbers."""
    count = source.num_classes
    if len(source.class_names) == count:
        return source.class_names
    fault = "it does not say what it was trained on"
    if source.names_data:
        config = source.config.copy_and_resolve_references().unlock()
        config.data.cache = "stream"  # nothing is decoded for the names
        try:
            found = open_dataset(config, config.data.train_split).class_names
            if len(found) == count:
                return found
            fault = f"its data have {len(found)} classes now, and it tells {count} apart"
        except UserError as error:
            fault = str(error)
    logging.warning("%s: its classes are named by numbers, for %s", source.origin, fault)
    return tuple(map(str, range(count)))
