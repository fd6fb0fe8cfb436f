"""Softmax attention: plain JAX, or cuDNN's fused kernel.

Shapes: B batch, N queries, M keys and values, H heads, hd width of a head.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def attention(
    q: Float[Array, "B N H hd"], k: Float[Array, "B M H hd"], v: Float[Array, "B M H hd"]
) -> Float[Array, "B N H hd"]:
    """Returns softmax(q k^T / sqrt(hd)) v, the softmax in float32.

    On a TPU the compiler fuses the softmax into the matmuls; no comparison with a hand-written kernel was made.
    """
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores).astype(v.dtype), v)


def fits_fused_kernel(dtype: jax.typing.DTypeLike, head_dim: int) -> bool:
    """True if JAX lets cuDNN's kernel compute this, forward and backward, for any sequence length."""
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    return half and head_dim <= 128 and head_dim % 8 == 0


@functools.cache
def has_fused_kernel() -> bool:
    """True if all GPUs of this process can run the kernel (Ampere or newer); JAX asks cuDNN even while it traces."""
    try:
        return all(float(device.compute_capability) >= 8 for device in jax.local_devices(backend="cuda"))
    except RuntimeError:  # no such backend
        return False


def fused_attention(
    implementation: Literal["cudnn", "xla"],
    q: Float[Array, "B N H hd"],
    k: Float[Array, "B M H hd"],
    v: Float[Array, "B M H hd"],
) -> Float[Array, "B N H hd"]:
    """Computes `attention` with `jax.nn.dot_product_attention`.

    cuDNN's kernel has no gradient for odd lengths, so these are padded by one token that is masked out.
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


def cudnn_attention(
    q: Float[Array, "B N H hd"], k: Float[Array, "B M H hd"], v: Float[Array, "B M H hd"]
) -> Float[Array, "B N H hd"]:
    """Computes `attention` with cuDNN's kernel where dtype and head width allow it; needs `has_fused_kernel`."""
    return fused_attention("cudnn", q, k, v) if fits_fused_kernel(q.dtype, q.shape[-1]) else attention(q, k, v)
