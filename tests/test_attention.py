"""Attention: by its formula, whatever computes it, and the right one of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_dist.attention import IMPLEMENTATIONS, attention, choose
from tests import QUICK

HERE = ("products", "library")  # cuDNN's needs a GPU


def draw(dtype=jnp.float32):
    shapes = ((2, 5, 3, 8), (2, 7, 3, 8), (2, 7, 3, 8))
    return [jax.random.normal(jax.random.key(i), shape).astype(dtype) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("name", HERE)
def test_by_the_formula(name):
    """softmax(q k^T / sqrt(hd)) v, head by head."""
    q, k, v = (np.asarray(x, np.float64) for x in draw())
    out = np.asarray(IMPLEMENTATIONS[name](*draw()))
    for head in range(3):
        weights = np.exp(q[:, :, head] @ k[:, :, head].transpose(0, 2, 1) / np.sqrt(8))
        expected = weights / weights.sum(-1, keepdims=True) @ v[:, :, head]
        np.testing.assert_allclose(out[:, :, head], expected, atol=1e-5)


@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_equal(dtype, rtol):
    """Outputs and gradients do not depend on what computes them."""

    def run(name):
        def loss(*operands):
            out = IMPLEMENTATIONS[name](*operands)
            return jnp.sin(out.astype(jnp.float32)).sum(), out

        with jax.numpy_dtype_promotion("standard"):  # JAX's own attention mixes types
            return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True), compiler_options=QUICK)(*draw(dtype))

    for a, b in zip(*(jax.tree.leaves(run(name)) for name in HERE), strict=True):
        assert a.dtype == dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


def test_large_scores_stay_finite():
    """exp of the raw scores would overflow."""
    big = jnp.full((1, 3, 1, 4), 1e3)
    np.testing.assert_allclose(attention(big, big, big), big)


@pytest.mark.parametrize(
    ("platform", "dtype", "length", "head_dim", "chosen"),
    [
        ("gpu", jnp.bfloat16, 196, 64, "cudnn"),
        ("gpu", jnp.bfloat16, 197, 64, "products"),  # cuDNN trains on even lengths only
        ("gpu", jnp.bfloat16, 196, 160, "products"),
        ("gpu", jnp.bfloat16, 196, 20, "products"),
        ("gpu", jnp.float32, 196, 64, "products"),
        ("tpu", jnp.bfloat16, 196, 64, "products"),
        ("cpu", jnp.float32, 65, 16, "products"),
    ],
)
def test_choice(platform, dtype, length, head_dim, chosen):
    """A kernel is asked for only where its documented limits allow it."""
    shape = (8, length, 4, head_dim)
    assert choose(platform, dtype, shape, shape) == chosen


def test_chosen_for_where_it_will_run(monkeypatch):
    """A step compiled here for other hardware gets that hardware's attention."""
    asked = []
    monkeypatch.setattr("mae_dist.attention.choose", lambda platform, *_: asked.append(platform) or "products")
    here = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    there = jax.sharding.AbstractMesh(
        (1,),
        ("x",),
        axis_types=(jax.sharding.AxisType.Auto,),
        abstract_device=jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu"),
    )
    for mesh in (here.abstract_mesh, there):
        with jax.sharding.use_abstract_mesh(mesh):
            jax.eval_shape(attention, *draw())
    jax.eval_shape(attention, *draw())
    assert asked == ["cpu", "tpu", "cpu"]
