"""Losses and counts against float64 NumPy and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_dist.tasks import losses

RNG = np.random.default_rng(0)
BATCH, LENGTH, VALUES = 3, 8, 12
PRED = RNG.normal(size=(BATCH, LENGTH, VALUES)).astype(np.float32)
PATCHES = RNG.normal(0.4, 0.3, size=(BATCH, LENGTH, VALUES)).astype(np.float32)
MASK = np.stack([RNG.permutation([0] * 3 + [1] * 5) for _ in range(BATCH)]).astype(np.float32)
LOGITS = RNG.normal(0, 4, size=(5, 7)).astype(np.float32)
LABELS = np.array([0, 6, 3, 3, 1])


def masked_loss(pred: np.ndarray) -> jax.Array:
    return losses.masked_pixel_loss(jnp.asarray(pred), jnp.asarray(PATCHES), jnp.asarray(MASK))


def test_masked_loss_is_the_mean_square_over_removed_patches():
    """Equation of He et al. 2021, section 3: per example here, and its batch mean the paper's."""
    square = (PRED.astype(np.float64) - PATCHES) ** 2
    expected = [square[b][MASK[b] == 1].mean() for b in range(BATCH)]
    np.testing.assert_allclose(masked_loss(PRED), expected, rtol=1e-6)
    assert float(masked_loss(PRED).mean()) == pytest.approx(square[MASK == 1].mean(), rel=1e-6)


def test_kept_patches_do_not_count():
    """A loss on visible patches would reward copying."""
    changed = np.where(MASK[:, :, None] == 0, 100.0, PRED).astype(np.float32)
    np.testing.assert_array_equal(masked_loss(changed), masked_loss(PRED))
    grad = np.asarray(jax.grad(lambda pred: masked_loss(pred).sum())(jnp.asarray(PRED)))
    assert (grad[MASK == 0] == 0).all()
    assert (grad[MASK == 1] != 0).all()


def test_normalised_target_has_unbiased_variance():
    """The paper's code divides by n - 1; n would shift every loss of a small patch."""
    mean, std = losses.patch_moments(jnp.asarray(PATCHES))
    assert mean.shape == std.shape == (BATCH, LENGTH, 1)
    np.testing.assert_allclose(std[..., 0] ** 2, PATCHES.astype(np.float64).var(-1, ddof=1) + 1e-6, rtol=1e-5)
    normal = np.asarray(losses.normalize_patches(jnp.asarray(PATCHES)))
    np.testing.assert_allclose(normal.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(normal.var(-1, ddof=1), 1, rtol=1e-4)


def test_constant_patch_normalises_to_zero():
    """An even background must not become noise or NaN."""
    np.testing.assert_array_equal(losses.normalize_patches(jnp.full((1, 2, 4), 0.5)), np.zeros((1, 2, 4)))


def test_denormalize_inverts_normalize():
    """Pictures of a normalised prediction shown as they are look like noise."""
    patches = jnp.asarray(PATCHES)
    mean, std = losses.patch_moments(patches)
    np.testing.assert_allclose(losses.normalize_patches(patches) * std + mean, PATCHES, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_cross_entropy_in_float64(smoothing):
    """In nats, with the smoothed share spread over all classes, the true one included."""
    soft = np.eye(7)[LABELS] * (1 - smoothing) + smoothing / 7
    expected = -(soft * scipy.special.log_softmax(LOGITS.astype(np.float64), axis=-1)).sum(-1)
    np.testing.assert_allclose(
        losses.cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABELS), smoothing), expected, rtol=2e-6
    )


def test_cross_entropy_of_soft_labels():
    """Integer labels are the corner of soft ones."""
    logits, one_hot = jnp.asarray(LOGITS), jnp.asarray(np.eye(7, dtype=np.float32)[LABELS])
    np.testing.assert_array_equal(
        losses.cross_entropy(logits, one_hot), losses.cross_entropy(logits, jnp.asarray(LABELS))
    )
    mixed = 0.3 * one_hot + 0.7 * one_hot[::-1]
    expected = -(np.asarray(mixed, np.float64) * scipy.special.log_softmax(LOGITS.astype(np.float64), -1)).sum(-1)
    np.testing.assert_allclose(losses.cross_entropy(logits, mixed), expected, rtol=2e-6)


def test_cross_entropy_of_extreme_and_of_bfloat16_logits():
    """Overflow of exp would be NaN; half precision of the sum would lose the small classes."""
    extreme = losses.cross_entropy(jnp.asarray([[1e4, 0.0], [-1e4, 0.0]]), jnp.asarray([0, 0]))
    np.testing.assert_allclose(extreme, [0, 1e4])
    half = jnp.asarray(LOGITS, jnp.bfloat16)
    out = losses.cross_entropy(half, jnp.asarray(LABELS))
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, losses.cross_entropy(half.astype(jnp.float32), jnp.asarray(LABELS)))


def test_constant_logits_cost_the_logarithm_of_the_classes():
    """And score nothing: a network that says the same for all must not show as correct."""
    logits, labels = jnp.zeros((10, 10)), jnp.arange(10)
    np.testing.assert_allclose(losses.cross_entropy(logits, labels), np.log(10), rtol=1e-6)
    for k in (1, 5, 9):
        assert not losses.top_k_correct(logits, labels, k).any()


@settings(max_examples=25)
@given(values=st.lists(st.integers(0, 4), min_size=7, max_size=7), label=st.integers(0, 6), k=st.integers(1, 6))
def test_top_k_by_definition(values, label, k):
    """Correct if fewer than k other classes are as high or higher; ties against the prediction."""
    expected = sum(value >= values[label] for i, value in enumerate(values) if i != label) < k
    logits = jnp.asarray([values], jnp.float32)
    assert bool(losses.top_k_correct(logits, jnp.asarray([label]), k)[0]) == expected


def test_top_k_with_nan():
    """A diverged model must not score: neither with NaN as the true logit nor beside it."""
    logits = jnp.asarray([[jnp.nan] * 4, [jnp.nan, 1.0, 2.0, 3.0], [9.0, 1.0, 2.0, jnp.nan]])
    correct = losses.top_k_correct(logits, jnp.asarray([0, 0, 0]), 1)
    np.testing.assert_array_equal(correct, [False, False, False])
