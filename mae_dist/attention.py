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
    was not, for want of a TPU. cuDNN's was lowered, but never run, for want of a GPU.
    """
    if not (fits_fused_kernel(q.dtype, q.shape[-1]) and has_fused_kernel()):
        return _products(q, k, v)
    return jax.lax.platform_dependent(q, k, v, cuda=IMPLEMENTATIONS["cudnn"], default=_products)


def fits_fused_kernel(dtype: Any, head_dim: int) -> bool:
    """Whether the limits that JAX sets to cuDNN's kernel allow it, for a gradient too, whatever the lengths."""
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    return half and head_dim <= 128 and head_dim % 8 == 0


@functools.cache
def has_fused_kernel() -> bool:
    """Whether this process has a GPU that runs it (Ampere or newer): JAX asks the library even while it traces."""
    try:
        return all(float(device.compute_capability) >= 8 for device in jax.local_devices(backend="cuda"))
    except RuntimeError:  # no such backend
        return False


def _products(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    scale = q.shape[-1] ** -0.5
    # Of scores there are more than of queries, and a factor on them the CPU's compiler writes out as an array; but a
    # query of less than float32 would be rounded once more.
    scale_first = q.dtype == jnp.float32
    scores = jnp.einsum("bqhd,bkhd->bhqk", q * scale if scale_first else q, k, preferred_element_type=jnp.float32)
    scores = scores if scale_first else scores * scale
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores).astype(v.dtype), v)


def _library(implementation: Literal["cudnn", "xla"], q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """JAX's own; odd lengths, whose gradient cuDNN's kernel lacks, are padded by a row that does not take part."""
    num_q, num_k = q.shape[1], k.shape[1]
    if num_q % 2 == num_k % 2 == 0:
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation)
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    padded = jax.nn.dot_product_attention(
        q,
        k,
        v,
        query_seq_lengths=jnp.full(q.shape[0], num_q, jnp.int32),
        key_value_seq_lengths=jnp.full(q.shape[0], num_k, jnp.int32),
        implementation=implementation,
    )
    return padded[:, :num_q]


# `library` is the same call as `cudnn` for any platform: its meaning can be tested without a GPU.
IMPLEMENTATIONS = {
    "products": _products,
    "cudnn": functools.partial(_library, "cudnn"),
    "library": functools.partial(_library, "xla"),
}
