"""Losses and counts. Shapes: B batch, L patches, P values of one patch, Y classes. All arithmetic in float32."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

_EPS = 1e-6


def patch_moments(patches: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of each patch, both (B, L, 1): unbiased variance plus 1e-6, as the paper's code."""
    mean = patches.mean(axis=-1, keepdims=True)
    var = patches.var(axis=-1, keepdims=True, ddof=1)
    return mean, jnp.sqrt(var + _EPS)


def normalize_patches(patches: jax.Array) -> jax.Array:
    """The `norm_pix_loss` target: each patch (B, L, P) with zero mean and unit variance."""
    mean, std = patch_moments(patches)
    return (patches - mean) / std


def visible_moments(patches: jax.Array, mask: jax.Array, grid: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Estimates the mean and standard deviation of each patch from the visible patches alone, both (B, L, 1).

    They are averages over the visible patches, weighted by the inverse square of the distance (Shepard 1968); a visible
    patch keeps its own.

    Args:
      patches: (B, L, P).
      mask: (B, L), 1 where a patch was removed.
      grid: the number of patches down and across, of product L.
    """
    places = np.indices(grid).reshape(2, -1)  # (2, L)
    squares = np.square(places[:, :, None] - places[:, None]).sum(axis=0)  # (L, L)
    weights = (1 - mask)[:, None] / np.maximum(squares, _EPS).astype(np.float32)  # (B, L, L)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    mean, std = patch_moments(patches)
    return weights @ mean, weights @ std


def denormalize_patches(pred: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """Turns a normalised prediction (B, L, P) back into pixels with the moments (B, L, 1) of the patches."""
    return pred * std + mean


def squared_error(pred: jax.Array, target: jax.Array) -> jax.Array:
    """Returns (pred - target)^2, elementwise."""
    return jnp.square(pred - target)


def masked_pixel_loss(
    pred: jax.Array,
    target: jax.Array,
    mask: jax.Array,
    error: Callable[[jax.Array, jax.Array], jax.Array] = squared_error,
) -> jax.Array:
    """Mean error of each example over its removed patches: pred, target (B, L, P), mask (B, L) -> (B,).

    Every example of a batch has the same number of removed patches, so the batch mean of this equals the paper's
    mean over all removed patches.
    """
    per_patch = error(pred.astype(jnp.float32), target).mean(axis=-1)  # (B, L)
    return (per_patch * mask).sum(axis=-1) / mask.sum(axis=-1)


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy of each example in nats: logits (B, Y), integer labels (B,) or soft labels (B, Y) -> (B,)."""
    logits = logits.astype(jnp.float32)
    num_classes = logits.shape[-1]
    soft = labels if labels.ndim == 2 else jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    soft = soft * (1 - label_smoothing) + label_smoothing / num_classes
    return -(soft * jax.nn.log_softmax(logits)).sum(axis=-1)


def top_k_correct(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Whether the true class is among the k highest: logits (B, Y), labels (B,) -> bool (B,).

    A tie with the k-th value counts against the prediction, so constant logits score 0 and not 1.
    """
    true_logit = jnp.take_along_axis(logits, labels[:, None], axis=-1)  # (B, 1)
    # "not lower" and not "higher or equal": a NaN anywhere must not count as correct.
    others = (~(logits < true_logit)).sum(axis=-1) - 1  # without the true class itself
    return others < k
