"""Softmax attention behind one function; which implementation computes it depends on platform, type and shape.

Shapes: B batch, N queries, M keys and values, H heads, hd width of a head.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(hd)) v, softmax in float32: q (B, N, H, hd), k and v (B, M, H, hd) -> (B, N, H, hd)."""
    return IMPLEMENTATIONS[choose(_platform(), q.dtype, q.shape, k.shape)](q, k, v)


def _platform() -> str:
    """What it will run on: that of the mesh it is traced for, which need not be here; without one, what is here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def choose(platform: str, dtype: Any, q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> str:
    """The name of the implementation: cuDNN's fused kernel where its documented limits allow it, else two products.

    On a CPU nothing tried was faster than the two products (`BUILD.md`); a TPU's compiler fuses the softmax into them.
    """
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    head_dim, even = q_shape[-1], q_shape[1] % 2 == k_shape[1] % 2 == 0
    return "cudnn" if platform == "gpu" and half and even and head_dim <= 128 and head_dim % 8 == 0 else "products"


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
