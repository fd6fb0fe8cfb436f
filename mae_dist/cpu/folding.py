"""Folds the scales and biases of LayerNorms, and LayerScales, into the matmuls beside them; unstacks blocks.

A LayerNorm's scale and bias act on the input of one matmul, a LayerScale on the output of one, so each can be
multiplied into that matmul's weights. That is done once per step, and so is its gradient, instead of once per
microbatch for every token. A model with `unfold(fold(params))` computes what it does with `params`, up to rounding;
`jax.vjp(fold, params)` maps gradients back.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

Params = Mapping[str, Any]

# Norms and the one matmul that reads them, in a block and in the decoder; LayerScales and the matmul they scale.
_NORMS = {"norm1": ("attn", "qkv"), "norm2": ("mlp", "fc1"), "norm": ("pred",)}
_SCALES = {"scale1": ("attn", "out"), "scale2": ("mlp", "fc2")}


def _get(params: Params, path: tuple[str, ...]) -> Any:
    """Returns what is at `path`, or an empty mapping."""
    for name in path:
        params = params.get(name, {})
    return params


def _set(params: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        params = params[name]
    params[path[-1]] = value


def _fold_norm(linear: Params, norm: Params) -> Params:
    """Folds a norm (scale and bias (*depth, D)) into the linear layer (kernel (*depth, D, *out)) that reads it."""
    scale, shift, kernel = norm["scale"], norm["bias"], linear["kernel"]
    matrix = kernel.reshape(*scale.shape, -1)
    bias = jnp.matmul(shift[..., None, :], matrix).reshape(linear["bias"].shape)
    return {"kernel": (scale[..., None] * matrix).reshape(kernel.shape), "bias": linear["bias"] + bias}


def _fold_scale(linear: Params, scale: jax.Array) -> Params:
    """Folds a LayerScale (depth, D) into the linear layer (kernel (depth, *in, D)) before it."""
    depth, width = scale.shape
    kernel = linear["kernel"]
    matrix = kernel.reshape(depth, -1, width)
    return {"kernel": (matrix * scale[:, None]).reshape(kernel.shape), "bias": linear["bias"] * scale}


def fold(params: Params) -> dict[str, Any]:
    """Folds norms and LayerScales, and unstacks the blocks into lists of arrays (1, ...)."""
    folded: dict[str, Any] = {
        name: fold(value) if isinstance(value, Mapping) else value for name, value in params.items()
    }
    for norm, path in _NORMS.items():
        if norm in folded and "bias" in _get(folded, path):  # a linear layer without bias cannot take the norm's
            _set(folded, path, _fold_norm(_get(folded, path), folded.pop(norm)))
    for scale, path in _SCALES.items():
        if scale in folded:
            _set(folded, path, _fold_scale(_get(folded, path), folded.pop(scale)))
    if "blocks" in folded:
        folded["blocks"] = jax.tree.map(lambda x: jax.lax.split(x, (1,) * x.shape[0]), folded["blocks"])
    return folded


def unfold(folded: Params, like: Params) -> dict[str, Any]:
    """Puts folded parameters into the structure of `like`, with norms and LayerScales that change nothing.

    Those are constants, which the compiler removes. It also removes the stacking of blocks where they are split again.
    """

    def restore(name: str, shape: Any) -> Any:
        if isinstance(shape, Mapping):
            return unfold(folded.get(name, {}), shape)
        if name in folded:
            return jnp.concatenate(folded[name]) if isinstance(folded[name], (list, tuple)) else folded[name]
        return (jnp.zeros if name == "bias" else jnp.ones)(shape.shape, shape.dtype)

    return {name: restore(name, shape) for name, shape in like.items()}
