"""Softmax attention, plain and by cuDNN's fused kernel.

Shapes: B batch, N queries, M keys and values, H heads, hd width of a head.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Returns softmax(q k^T / sqrt(hd)) v: q (B, N, H, hd), k and v (B, M, H, hd) -> (B, N, H, hd); softmax in float32.

    A TPU's compiler fuses the softmax into the matmuls. It was not compared with a kernel written by hand.
    """
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores).astype(v.dtype), v)


def fits_fused_kernel(dtype: Any, head_dim: int) -> bool:
    """True if the limits that JAX sets to cuDNN's kernel allow it, for a gradient too, whatever the lengths."""
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    return half and head_dim <= 128 and head_dim % 8 == 0


@functools.cache
def has_fused_kernel() -> bool:
    """True if this process has a GPU that runs it (Ampere or newer): JAX asks the library even while it traces."""
    try:
        return all(float(device.compute_capability) >= 8 for device in jax.local_devices(backend="cuda"))
    except RuntimeError:  # no such backend
        return False


def fused_attention(implementation: Literal["cudnn", "xla"], q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Computes `attention` by JAX's own function, `implementation` of it.

    cuDNN's kernel lacks the gradient of odd lengths: these are padded by a row that does not take part.
    """
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


def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Computes `attention` by cuDNN's kernel where type and head width allow it; needs a GPU that has it."""
    return fused_attention("cudnn", q, k, v) if fits_fused_kernel(q.dtype, q.shape[-1]) else attention(q, k, v)
