"""Softmax attention behind one function; which implementation computes it depends on platform, type and shape.

Shapes: B batch, N queries, M keys and values, H heads, hd width of a head.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mae_dist.model.by_platform import by_platform
from mae_dist.model.onednn import in_use, matmul


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(hd)) v, softmax in float32: q (B, N, H, hd), k and v (B, M, H, hd) -> (B, N, H, hd).

    What computes it goes by the platform that a program is lowered for, whatever this process runs on: cuDNN's fused
    kernel on an NVIDIA GPU where it can, else two products; on a CPU these are laid out, and their gradient written,
    for it. For a TPU it is left to XLA, whose compiler fuses the softmax into the products: compared with a kernel
    written by hand it was not, for want of a TPU. cuDNN's was lowered, but never run, for want of a GPU.
    """
    special = {}
    if q.dtype == jnp.float32:
        special["cpu"] = functools.partial(_heads_first, by_onednn=in_use())
    if fits_fused_kernel(q.dtype, q.shape[-1]) and has_fused_kernel():
        special["cuda"] = IMPLEMENTATIONS["cudnn"]
    if not special:
        return _products(q, k, v)
    return by_platform(q, k, v, **special, default=_products)


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
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores).astype(v.dtype), v)


def _swap_heads(x: jax.Array) -> jax.Array:
    """(B, N, H, hd) <-> (B, H, N, hd)."""
    return x.transpose(0, 2, 1, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _heads_first(q: jax.Array, k: jax.Array, v: jax.Array, by_onednn: bool = False) -> jax.Array:
    """The two products, of float32, as a CPU takes the least time for them.

    Heads come before tokens, so that nothing is transposed within a product. Queries are scaled, for there are fewer
    of them than of scores. The gradient of the softmax subtracts the mean of each row's gradient, weighted by its
    probabilities: that is found from the output (B, N, H, hd) instead of from the scores (B, H, N, M).
    """
    return _heads_first_forward(q, k, v, by_onednn)[0]


def _heads_first_forward(q: jax.Array, k: jax.Array, v: jax.Array, by_onednn: bool) -> Any:
    q, k, v = _swap_heads(q) * q.shape[-1] ** -0.5, _swap_heads(k), _swap_heads(v)  # (B, H, N, hd), 2 (B, H, M, hd)
    share = jax.nn.softmax(matmul(q, k, (False, True), by_onednn))  # (B, H, N, M)
    out = matmul(share, v, (False, False), by_onednn)  # (B, H, N, hd)
    return _swap_heads(out), (q, k, v, share, out)


def _heads_first_backward(by_onednn: bool, saved: Any, grad: jax.Array) -> Any:
    q, k, v, share, out = saved
    grad = _swap_heads(grad)  # (B, H, N, hd)
    mean = (grad * out).sum(axis=3, keepdims=True)  # (B, H, N, 1)
    scores = share * (matmul(grad, v, (False, True), by_onednn) - mean)  # (B, H, N, M)
    dq = matmul(scores, k, (False, False), by_onednn) * q.shape[-1] ** -0.5
    dk = matmul(scores, q, (True, False), by_onednn)
    dv = matmul(share, grad, (True, False), by_onednn)
    return _swap_heads(dq), _swap_heads(dk), _swap_heads(dv)


_heads_first.defvjp(_heads_first_forward, _heads_first_backward)


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
    "heads_first": _heads_first,
    "cudnn": functools.partial(_library, "cudnn"),
    "library": functools.partial(_library, "xla"),
}
