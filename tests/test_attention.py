"""Attention: by its formula, whatever computes it, and the right one of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_dist.cpu import kernels
from mae_dist.model import attention as attention_lib
from mae_dist.model.attention import attention, cudnn_attention, fused_attention
from tests import QUICK

IMPLEMENTATIONS = {
    "plain": attention,
    "library": functools.partial(fused_attention, "xla"),  # the same call as cuDNN's, which needs a GPU
    "cpu": kernels.make_hooks(False).attention,
}


def draw(dtype=jnp.float32, num_q=5, num_k=7):
    shapes = ((2, num_q, 3, 8), (2, num_k, 3, 8), (2, num_k, 3, 8))
    return [jax.random.normal(jax.random.key(i), shape).astype(dtype) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_by_the_formula(name):
    """softmax(q k^T / sqrt(hd)) v, head by head."""
    q, k, v = (np.asarray(x, np.float64) for x in draw())
    out = np.asarray(IMPLEMENTATIONS[name](*draw()))
    for head in range(3):
        weights = np.exp(q[:, :, head] @ k[:, :, head].transpose(0, 2, 1) / np.sqrt(8))
        expected = weights / weights.sum(-1, keepdims=True) @ v[:, :, head]
        np.testing.assert_allclose(out[:, :, head], expected, atol=1e-5)


@pytest.mark.parametrize(("num_q", "num_k"), [(5, 7), (5, 6), (4, 7), (4, 6)])
@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_equal(dtype, rtol, num_q, num_k):
    """Outputs and gradients do not depend on what computes them, nor on the row that pads an odd length."""

    def run(name):
        def loss(*operands):
            out = IMPLEMENTATIONS[name](*operands)
            return jnp.sin(out.astype(jnp.float32)).sum(), out

        with jax.numpy_dtype_promotion("standard"):  # JAX's own attention mixes types
            return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True), compiler_options=QUICK)(
                *draw(dtype, num_q, num_k)
            )

    first, *others = (jax.tree.leaves(run(name)) for name in IMPLEMENTATIONS)
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert a.dtype == b.dtype == dtype
            a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
            np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


def test_a_cpu_takes_its_own():
    """Of float32 only: there are no transposes within products, whose heads come first."""
    for dtype, first in ((jnp.float32, True), (jnp.bfloat16, False)):
        text = jax.jit(IMPLEMENTATIONS["cpu"]).lower(*draw(dtype)).as_text()
        assert ("2x3x5x8" in text) == first


def test_large_scores_stay_finite():
    """exp of the raw scores would overflow."""
    big = jnp.full((1, 3, 1, 4), 1e3)
    np.testing.assert_allclose(attention(big, big, big), big)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "fits"),
    [
        (jnp.bfloat16, 64, True),
        (jnp.float16, 80, True),
        (jnp.bfloat16, 160, False),
        (jnp.bfloat16, 20, False),
        (jnp.float32, 64, False),
    ],
)
def test_limits_of_the_fused_kernel(dtype, head_dim, fits):
    """A kernel is asked for only where JAX lets it."""
    assert attention_lib.fits_fused_kernel(dtype, head_dim) == fits


def test_no_fused_kernel_without_a_gpu():
    """Where JAX has no CUDA, nothing asks for cuDNN, which could not even be traced."""
    assert attention_lib.has_fused_kernel() == (jax.default_backend() == "gpu")


@pytest.mark.parametrize(
    ("num_q", "num_k"), [(196, 196), (197, 197), (147, 197), (257, 257), (50, 50), (65, 65), (49, 50)]
)
@pytest.mark.parametrize(("head_dim", "fused"), [(80, True), (20, False)])
def test_lowered_for_a_gpu(monkeypatch, head_dim, fused, num_q, num_k):
    """cuDNN's kernel forward and backward, for all lengths of the paper's models, and only where the width fits it.

    Encoder and decoder may differ in width. What needs a GPU is only to ask which version of cuDNN there is.
    """
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    queries, keys = (jax.ShapeDtypeStruct((8, length, 4, head_dim), jnp.bfloat16) for length in (num_q, num_k))
    grad = jax.grad(lambda q, k, v: cudnn_attention(q, k, v).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    with jax.numpy_dtype_promotion("standard"):  # within JAX's own attention
        text = jax.jit(grad).trace(queries, keys, keys).lower(lowering_platforms=("cuda",)).as_text()
    for name in ("__cudnn$fmhaSoftmax(", "__cudnn$fmhaSoftmaxBackward("):
        assert (name in text) == fused
    assert ("stablehlo.exponential" in text) != fused
