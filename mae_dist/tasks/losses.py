"""Losses, and whether predictions are right. Shapes: B batch, L patches, P values of one patch, Y classes.

All arithmetic is in float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

_EPS = 1e-6


def patch_moments(patches: Float[Array, "B L P"]) -> tuple[Float[Array, "B L 1"], Float[Array, "B L 1"]]:
    """Returns mean and standard deviation of each patch, of the unbiased variance plus 1e-6, as in the paper's code."""
    mean = patches.mean(axis=-1, keepdims=True)
    var = patches.var(axis=-1, keepdims=True, ddof=1)
    return mean, jnp.sqrt(var + _EPS)


def normalize_patches(patches: Float[Array, "B L P"]) -> Float[Array, "B L P"]:
    """Returns the `norm_pix_loss` target: each patch with zero mean and unit variance."""
    mean, std = patch_moments(patches)
    return (patches - mean) / std


def visible_moments(
    patches: Float[Array, "B L P"], mask: Float[Array, "B L"], grid: tuple[int, int]
) -> tuple[Float[Array, "B L 1"], Float[Array, "B L 1"]]:
    """Estimates mean and standard deviation of each patch from the visible patches alone.

    The estimates are averages over the visible patches, weighted by the inverse square of the distance (Shepard 1968).
    A visible patch keeps its own moments.

    Args:
      patches: all patches.
      mask: 1 where a patch was removed.
      grid: (gh, gw), with gh * gw = L.
    """
    places = np.indices(grid).reshape(2, -1)  # (2, L)
    squares = np.square(places[:, :, None] - places[:, None]).sum(axis=0)  # (L, L)
    weights = (1 - mask)[:, None] / np.maximum(squares, _EPS).astype(np.float32)  # (B, L, L)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    mean, std = patch_moments(patches)
    return weights @ mean, weights @ std


def masked_pixel_loss(
    pred: Float[Array, "B L P"],
    target: Float[Array, "B L P"],
    mask: Float[Array, "B L"],
    error: Callable[[jax.Array, jax.Array], jax.Array] = optax.squared_error,
) -> Float[Array, "B"]:
    """Returns the mean error of each example over its removed patches.

    All examples have the same number of removed patches, so the batch mean equals the paper's mean over all removed
    patches.
    """
    per_patch = error(pred.astype(jnp.float32), target).mean(axis=-1)  # (B, L)
    return (per_patch * mask).sum(axis=-1) / mask.sum(axis=-1)


def cross_entropy(
    logits: Float[Array, "B Y"],
    labels: Int[Array, "B"] | Float[Array, "B Y"],
    label_smoothing: float = 0.0,
) -> Float[Array, "B"]:
    """Returns the cross-entropy of each example in nats, with integer or soft labels."""
    logits = logits.astype(jnp.float32)
    soft = labels if labels.ndim == 2 else jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(soft, label_smoothing))


def top_k_correct(logits: Float[Array, "B Y"], labels: Int[Array, "B"], k: int) -> Bool[Array, "B"]:
    """Returns True for each example whose true class is among the k highest logits.

    A tie with the k-th value counts as wrong, so constant logits score 0 and not 1.
    """
    true_logit = jnp.take_along_axis(logits, labels[:, None], axis=-1)  # (B, 1)
    # "not lower" and not "higher or equal": a NaN anywhere must not count as correct.
    others = (~(logits < true_logit)).sum(axis=-1) - 1  # minus the true class itself
    return others < k
