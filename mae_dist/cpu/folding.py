"""Folds the scales and biases of LayerNorms, and LayerScales, into the matmuls beside them; unstacks blocks.

A LayerNorm's scale and bias act on the input of one matmul, a LayerScale on the output of one, so each can be
multiplied into that matmul's weights. That is done once per step, and so is its gradient, instead of once per
microbatch for every token. A model with `unfold(fold(params))` computes what it does with `params`, up to rounding;
`jax.vjp(fold, params)` maps gradients back.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

Params = dict[str, Any]

# Norms and the one matmul that reads them, in a block and in the decoder; LayerScales and the matmul they scale. The
# first norm of a block is read by q, k and v, or by q alone where attention is to other tokens.
_NORMS = {
    "norm1": (("attn", "qkv"), ("attn", "q")),
    "norm_kv": (("kv",),),
    "norm2": (("mlp", "fc1"),),
    "norm": (("pred",),),
}
_SCALES = {"scale1": ("attn", "out"), "scale2": ("mlp", "fc2")}


def _fold_norm(kernel: jax.Array, bias: jax.Array, scale: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Folds a norm's scale and shift (*depth, D) into the kernel (*depth, D, *out) and bias of the layer after it."""
    matrix = kernel.reshape(*scale.shape, -1)
    added = jnp.matmul(shift[..., None, :], matrix).reshape(bias.shape)
    return (scale[..., None] * matrix).reshape(kernel.shape), bias + added


def _fold_scale(kernel: jax.Array, bias: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Folds a LayerScale (depth, D) into the kernel (depth, *in, D) and bias of the layer before it."""
    depth, width = scale.shape
    return (kernel.reshape(depth, -1, width) * scale[:, None]).reshape(kernel.shape), bias * scale


def fold(params: Params) -> Params:
    """Folds norms and LayerScales, and unstacks the blocks into lists of arrays (1, ...)."""
    flat: dict[tuple[str, ...], Any] = flatten_dict(params)
    for *group, name, leaf in list(flat):
        for reader in _NORMS.get(name, ()) if leaf == "scale" else ():
            kernel, bias = ((*group, *reader, part) for part in ("kernel", "bias"))
            if bias in flat:  # a linear layer without bias cannot take the norm's
                scale, shift = (flat.pop((*group, name, part)) for part in ("scale", "bias"))
                flat[kernel], flat[bias] = _fold_norm(flat[kernel], flat[bias], scale, shift)
    for *group, name in list(flat):
        if name in _SCALES:
            kernel, bias = ((*group, *_SCALES[name], part) for part in ("kernel", "bias"))
            flat[kernel], flat[bias] = _fold_scale(flat[kernel], flat[bias], flat.pop((*group, name)))
    unstacked = {path: jax.lax.split(x, (1,) * x.shape[0]) if "blocks" in path else x for path, x in flat.items()}
    return unflatten_dict(unstacked)


def unfold(folded: Params, like: Params) -> Params:
    """Puts folded parameters into the structure of `like`, with norms and LayerScales that change nothing.

    Those are constants, which the compiler removes. It also removes the stacking of blocks where they are split again.
    """
    flat: dict[tuple[str, ...], Any] = flatten_dict(folded)
    shapes: dict[tuple[str, ...], Any] = flatten_dict(like)

    def restore(path: tuple[str, ...], shape: jax.ShapeDtypeStruct | jax.Array) -> jax.Array:
        if path in flat:
            return jnp.concatenate(flat[path]) if "blocks" in path else flat[path]
        return (jnp.zeros if path[-1] == "bias" else jnp.ones)(shape.shape, shape.dtype)

    return unflatten_dict({path: restore(path, shape) for path, shape in shapes.items()})
