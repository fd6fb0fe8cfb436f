"""Stateless parts of the layers, in plain JAX.

Parameters are float32; matmuls run in a module's `dtype`; normalisation statistics are float32. Randomness comes in as
one key per example, `keys` (B,), or None for a deterministic pass, so that dropout of an example does not depend on
which batch or device holds it.
"""

from collections.abc import Callable
from types import EllipsisType

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key


def fold_in(keys: Key[Array, "B"] | None, data: ArrayLike) -> Key[Array, "B"] | None:
    """Returns keys for another purpose, which `data` numbers; None stays None."""
    return None if keys is None else jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)


def dropout(x: Float[Array, "B *rest"], rate: float, keys: Key[Array, "B"] | None) -> Float[Array, "B *rest"]:
    """Zeroes single values of x with probability `rate` and scales the rest by 1 / (1 - rate)."""
    if keys is None or rate == 0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros_like(x))


def drop_path(x: Float[Array, "B N D"], rate: ArrayLike, keys: Key[Array, "B"] | None) -> Float[Array, "B N D"]:
    """Zeroes whole examples of a residual branch with probability `rate`, which may be traced.

    Stochastic depth (Huang et al. 2016); the branches that are kept are scaled by 1 / (1 - rate).
    """
    if keys is None:
        return x
    keep = jax.vmap(lambda key: jax.random.uniform(key) >= rate)(keys)  # (B,)
    scale = jnp.where(keep, 1 / (1 - rate), 0.0).astype(x.dtype)
    return x * scale[:, None, None]


def affine(
    x: Float[Array, "..."], kernel: Float[Array, "..."], bias: Float[Array, "..."] | None, inputs: int
) -> Float[Array, "..."]:
    """Returns x (*rows, *in) times kernel (*in, *out), of `inputs` input axes, plus bias (*out): (*rows, *out)."""
    axes = (tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs)))
    out = jax.lax.dot_general(x, kernel, (axes, ((), ())))
    return out if bias is None else out + bias


def linear(
    module: nnx.Linear | nnx.LinearGeneral,
    x: Float[Array, "..."],
    part: int | slice | EllipsisType = ...,
    *,
    affine: Callable[..., jax.Array] = affine,
) -> Float[Array, "..."]:
    """Applies a linear module to x (*rows, *in) in the module's dtype: (*rows, *out).

    Args:
      module: its kernel and bias.
      x: inputs.
      part: an index into the first output axis; only that part is computed, by default all.
      affine: computes it, see `hooks`.
    """
    inputs = len(module.axis) if isinstance(module, nnx.LinearGeneral) else 1
    kernel = module.kernel[(slice(None),) * inputs + (part,)].astype(module.dtype)
    bias = None if module.bias is None else module.bias[part].astype(module.dtype)
    return affine(x.astype(module.dtype), kernel, bias, inputs)


def layer_norm(norm: nnx.LayerNorm, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    """Applies `norm` to x in float32; returns x's own dtype."""
    assert norm.scale is not None
    assert norm.bias is not None
    values = x.astype(jnp.float32)
    centred = values - values.mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + norm.epsilon)
    return (centred * inverse * norm.scale[...] + norm.bias[...]).astype(x.dtype)
