"""Softmax attention behind one function; which implementation computes it depends on platform, type and shape.

Shapes: B batch, N queries, M keys and values, H heads, hd width of a head.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(hd)) v, softmax in float32: q (B, N, H, hd), k and v (B, M, H, hd) -> (B, N, H, hd).

    What computes it goes by the platform that a program is lowered for, whatever this process runs on: cuDNN's fused
    kernel on an NVIDIA GPU where it can, else two products. On a CPU nothing tried was faster (`BUILD.md`). For a TPU
    it is left to XLA, whose compiler fuses the softmax into the products: compared with a kernel written by hand it
    was not, nor was cuDNN's measured, for want of a TPU and a GPU.
    """
    if not (fits_fused_kernel(q.dtype, q.shape, k.shape) and has_fused_kernel()):
        return _products(q, k, v)
    return jax.lax.platform_dependent(q, k, v, cuda=IMPLEMENTATIONS["cudnn"], default=_products)


def fits_fused_kernel(dtype: Any, q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> bool:
    """Whether the limits that JAX sets to cuDNN's kernel allow it, for a gradient too: even lengths are one."""
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    head_dim, even = q_shape[-1], q_shape[1] % 2 == k_shape[1] % 2 == 0
    return half and even and head_dim <= 128 and head_dim % 8 == 0


@functools.cache
def has_fused_kernel() -> bool:
    """Whether this process has a GPU that runs it (Ampere or newer): JAX asks the library even while it traces."""
    try:
        return all(float(device.compute_capability) >= 8 for device in jax.local_devices(backend="cuda"))
    except RuntimeError:  # no such backend
        return False


def _products(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * (q.shape[-1] ** -0.5)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores).astype(v.dtype), v)


def _library(implementation: Literal["cudnn", "xla"], q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, implementation=implementation)


# `library` is the same call as `cudnn` for any platform: its meaning can be tested without a GPU.
IMPLEMENTATIONS = {
    "products": _products,
    "cudnn": functools.partial(_library, "cudnn"),
    "library": functools.partial(_library, "xla"),
}
