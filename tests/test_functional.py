"""What layers are made of: randomness per example, and gradients of their own against those that JAX derives."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mae_dist.cpu import kernels
from mae_dist.model import functional
from tests import QUICK

BATCH, TOKENS, DIM = 6, 5, 8
X = jax.random.normal(jax.random.key(0), (BATCH, TOKENS, DIM))
KEYS = jax.random.split(jax.random.key(1), BATCH)
MANY = jax.random.split(jax.random.key(2), 4000)

HOOKS = kernels.make_hooks(False)


def test_no_keys_means_no_dropout():
    """Evaluation must be deterministic: None turns everything random off."""
    assert functional.fold_in(None, 3) is None
    assert functional.dropout(X, 0.5, None) is X
    assert functional.drop_path(X, 0.5, None) is X


def test_dropout_zeroes_single_values_and_keeps_the_mean():
    """Without the scale by 1 / (1 - rate), training and evaluation would see different magnitudes."""
    out = np.asarray(functional.dropout(jnp.ones((4000, 7)), 0.3, MANY))
    assert set(np.unique(out)) == {0.0, np.float32(1 / np.float32(0.7))}
    assert abs((out == 0).mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / out.size)
    assert out.mean() == pytest.approx(1, abs=0.02)


def test_drop_path_drops_whole_examples_and_keeps_the_mean():
    """Stochastic depth removes a branch of one example, not of the batch and not single values."""
    out = np.asarray(functional.drop_path(jnp.ones((4000, 3, 2)), 0.4, MANY))
    per_example = out.reshape(4000, -1)
    assert (per_example == per_example[:, :1]).all()
    assert set(np.unique(out)) == {0.0, np.float32(1 / np.float32(0.6))}
    assert abs((per_example[:, 0] == 0).mean() - 0.4) < 5 * np.sqrt(0.4 * 0.6 / 4000)
    assert out.mean() == pytest.approx(1, abs=0.05)


def test_drop_path_of_rate_zero_changes_nothing():
    """The first block has rate 0."""
    np.testing.assert_array_equal(functional.drop_path(X, jnp.float32(0), KEYS), X)


@pytest.mark.parametrize("layer", [functional.dropout, functional.drop_path])
def test_an_example_has_its_own_dropout(layer):
    """An example's noise may depend on its key alone, so that it does not change with devices or accumulation."""
    out = np.asarray(layer(X, 0.5, KEYS))
    order = np.array([3, 0, 5, 1, 4, 2])
    np.testing.assert_array_equal(layer(X[order], 0.5, KEYS[order]), out[order])
    np.testing.assert_array_equal(layer(X, 0.5, KEYS), out)
    others = [np.asarray(layer(X, 0.5, functional.fold_in(KEYS, i))) for i in range(3)]
    assert any((out != other).any() for other in others)


def test_layer_norm_statistics_are_float32():
    """In bfloat16 the variance of values around 100 would be lost."""
    norm = nnx.LayerNorm(DIM, epsilon=1e-6, rngs=nnx.Rngs(0))
    x = jnp.asarray(100 + 4 * np.arange(DIM), jnp.bfloat16)[None]
    out = functional.layer_norm(norm, x)
    assert out.dtype == jnp.bfloat16
    exact = (np.arange(DIM) - 3.5) / np.std(np.arange(DIM))
    np.testing.assert_allclose(out[0].astype(jnp.float32), exact, atol=0.01)


def test_gradients_of_products_and_norms():
    """Written by hand, so compared with those JAX derives."""
    x = jax.random.normal(jax.random.key(0), (3, 5, 2, 4))
    kernel = jax.random.normal(jax.random.key(1), (2, 4, 3, 6))
    bias, weights = jnp.ones((3, 6)), jax.random.normal(jax.random.key(2), (3, 5, 3, 6))
    affine: Any = HOOKS.affine
    gelu: Any = HOOKS.gelu

    pairs = (
        (
            lambda x, k, b: (affine(x, k, b, 2) * weights).sum(),
            lambda x, k, b: ((jnp.einsum("rshd,hdef->rsef", x, k) + b) * weights).sum(),
            (x, kernel, bias),
        ),
        (
            lambda x, k: (affine(x, k, None, 2) * weights).sum(),
            lambda x, k: (jnp.einsum("rshd,hdef->rsef", x, k) * weights).sum(),
            (x, kernel),
        ),
        (lambda x: (gelu(x, False) * x).sum(), lambda x: (x * x * jax.scipy.stats.norm.cdf(x)).sum(), (x,)),
        (lambda x: gelu(3 * x, False).sum(), lambda x: jax.nn.gelu(3 * x, approximate=False).sum(), (x,)),
        (lambda x: gelu(x, True).sum(), lambda x: jax.nn.gelu(x).sum(), (x,)),
    )
    for ours, derived, arguments in pairs:
        derivatives = [jax.grad(f, argnums=range(len(arguments))) for f in (ours, derived)]
        for got, wanted in zip(*(jax.jit(f, compiler_options=QUICK)(*arguments) for f in derivatives), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=1e-5)


def test_gelu_far_out():
    """x on one side and zero on the other, with the slopes of both, up to where squares overflow."""
    x = jnp.asarray([-1e30, -100.0, -6.0, 0.0, 6.0, 100.0, 1e30])
    value, slope = HOOKS.gelu(x, False), jax.grad(lambda x: HOOKS.gelu(x, False).sum())(x)
    np.testing.assert_allclose(value, jnp.maximum(x, 0), atol=1e-6)
    np.testing.assert_allclose(slope, [0, 0, 0, 0.5, 1, 1, 1], atol=1e-6)
