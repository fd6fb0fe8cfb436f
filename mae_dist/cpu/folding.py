"""Parameters as a CPU computes with them: norms and LayerScale multiplied into the products beside them, blocks apart.

A LayerNorm's scale and bias act on the input of one product, a LayerScale on the output of one; so each can as well be
a factor of that product's weights. There it is multiplied in once an update, and has its gradient once an update, from
the gradient of the weights: instead of once a piece of the batch for each of its tokens. `unfold(fold(params))`
computes what `params` does, but for rounding, and by `jax.vjp(fold, params)` gradients find their way back.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

Params = Mapping[str, Any]

# Norms and the only product that takes their output, in a block and in the decoder; LayerScales and the product whose
# output they take.
_NORMS = {"norm1": ("attn", "qkv"), "norm2": ("mlp", "fc1"), "norm": ("pred",)}
_SCALES = {"scale1": ("attn", "out"), "scale2": ("mlp", "fc2")}


def _get(params: Params, path: tuple[str, ...]) -> Any:
    """What stands at `path`, or nothing: an empty mapping."""
    for name in path:
        params = params.get(name, {})
    return params


def _set(params: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        params = params[name]
    params[path[-1]] = value


def _fold_norm(linear: Params, norm: Params) -> Params:
    """The product (kernel (*depth, D, *out)) of what `norm` (scale and bias (*depth, D)) takes as input."""
    scale, shift, kernel = norm["scale"], norm["bias"], linear["kernel"]
    matrix = kernel.reshape(*scale.shape, -1)
    bias = jnp.matmul(shift[..., None, :], matrix).reshape(linear["bias"].shape)
    return {"kernel": (scale[..., None] * matrix).reshape(kernel.shape), "bias": linear["bias"] + bias}


def _fold_scale(linear: Params, scale: jax.Array) -> Params:
    """The product (kernel (depth, *in, D)) whose output is multiplied by `scale` (depth, D)."""
    depth, width = scale.shape
    kernel = linear["kernel"]
    matrix = kernel.reshape(depth, -1, width)
    return {"kernel": (matrix * scale[:, None]).reshape(kernel.shape), "bias": linear["bias"] * scale}


def fold(params: Params) -> dict[str, Any]:
    """Takes out norms and LayerScales and what a stack of blocks holds apart, as lists of (1, ...)."""
    folded: dict[str, Any] = {
        name: fold(value) if isinstance(value, Mapping) else value for name, value in params.items()
    }
    for norm, path in _NORMS.items():
        if norm in folded and "bias" in _get(folded, path):  # without a bias a norm's has nowhere to go
            _set(folded, path, _fold_norm(_get(folded, path), folded.pop(norm)))
    for scale, path in _SCALES.items():
        if scale in folded:
            _set(folded, path, _fold_scale(_get(folded, path), folded.pop(scale)))
    if "blocks" in folded:
        folded["blocks"] = jax.tree.map(lambda x: jax.lax.split(x, (1,) * x.shape[0]), folded["blocks"])
    return folded


def unfold(folded: Params, like: Params) -> dict[str, Any]:
    """What `fold` gave, in the structure of `like`: norms and LayerScales that leave their input as it is.

    These are constants, which the compiler drops; as it drops putting the blocks together, where they are taken apart.
    """

    def restore(name: str, shape: Any) -> Any:
        if isinstance(shape, Mapping):
            return unfold(folded.get(name, {}), shape)
        if name in folded:
            return jnp.concatenate(folded[name]) if isinstance(folded[name], (list, tuple)) else folded[name]
        return (jnp.zeros if name == "bias" else jnp.ones)(shape.shape, shape.dtype)

    return {name: restore(name, shape) for name, shape in like.items()}
