"""Renames tensors that a wrapper, a relative or another version of a program wrote to the names of `layouts`."""

import re
from collections.abc import Mapping

import numpy as np

from mae_dist.errors import DataFault

Tensors = dict[str, np.ndarray]

# The names of `transformers` 5 inside a model, what it writes for a decoder's blocks, and those of Pixio's files -> the
# names of its files since 4, which both versions read. Those that begin a name come first.
_HF_ALIASES = (
    ("vit.layers.", "vit.encoder.layer."),
    ("decoder.decoder_encoder.layer.", "decoder.decoder_layers."),
    (".attention.q_proj.", ".attention.attention.query."),
    (".attention.k_proj.", ".attention.attention.key."),
    (".attention.v_proj.", ".attention.attention.value."),
    (".attention.o_proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
)
# What comes before a model's names where a program has wrapped it: whatever stands before its patch embedding.
_WRAPPED = re.compile(r"((?:.*?\.)??)(?:patch_embed\.proj|(?:vit\.)?embeddings\.patch_embeddings\.projection)\.weight")
_BEIT_SCALE = re.compile(r"^(blocks\.\d+)\.gamma_([12])$")  # many programs took over BEiT's names


def prefixes_in(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Returns the prefix of the names of each model in a file: `module.` or `_orig_mod.` of a wrapper, `backbone.`, …

    A model is recognised by its patch embedding; one that nothing wraps has the prefix "".
    """
    return sorted({match[1] for match in map(_WRAPPED.fullmatch, tensors) if match})


def with_timm_names(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Returns tensors of a relative of timm's layout under timm's names.

    BEiT's `q_bias` and `v_bias` become the bias of queries, keys and values, zero for the keys; its `gamma_1` and
    `gamma_2` are LayerScale.
    """
    result = {_BEIT_SCALE.sub(r"\1.ls\2.gamma", name): tensor for name, tensor in tensors.items()}
    for name in [name for name in result if name.endswith(".attn.q_bias")]:
        block = name.removesuffix("q_bias")
        query, value = result[name], result.get(f"{block}v_bias")
        if value is not None and query.shape == value.shape and query.ndim == 1 and f"{block}qkv.bias" not in result:
            del result[name], result[f"{block}v_bias"]
            result[f"{block}qkv.bias"] = np.concatenate([query, np.zeros_like(query), value])
    return result


def fold_head_norm(tensors: Mapping[str, np.ndarray], eps: float) -> Tensors | None:
    """Multiplies the BatchNorm of a linear probe into the layer after it; None if the head is no such pair.

    The paper's code names the BatchNorm `head.0` and the layer `head.1`; both become `head`.
    """
    mean, var = tensors.get("head.0.running_mean"), tensors.get("head.0.running_var")
    gain, offset = tensors.get("head.0.weight"), tensors.get("head.0.bias")
    kernel, bias = tensors.get("head.1.weight"), tensors.get("head.1.bias")
    if mean is None or var is None or kernel is None or bias is None or kernel.ndim != 2:
        return None
    if {mean.shape, var.shape} != {kernel.shape[1:]} or bias.shape != kernel.shape[:1]:
        return None
    with np.errstate(invalid="ignore"):  # the check of all tensors reports what is not finite
        scale = 1 / np.sqrt(var.astype(np.float64) + eps)
    shift = -mean * scale
    if gain is not None and offset is not None:
        scale, shift = scale * gain, shift * gain + offset
    rest = {name: tensor for name, tensor in tensors.items() if not re.match(r"head\.[01]\.", name)}
    head = {"head.weight": kernel * scale, "head.bias": bias + kernel @ shift}
    return rest | {name: value.astype(np.float32) for name, value in head.items()}


def with_standard_names(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Returns Hugging Face's tensors under the names of their files since transformers 4.

    In a file of an encoder alone they lack `vit.`. A pooler is left out: no result here depends on that layer.
    """
    result = {}
    bare = not any(name.startswith("vit.") for name in tensors)
    for original, tensor in tensors.items():
        name = original
        if bare and name.partition(".")[0] in ("embeddings", "encoder", "layers", "layernorm", "pooler"):
            name = f"vit.{name}"
        for alias, standard in _HF_ALIASES:
            name = name.replace(alias, standard)
        if name in result:
            raise DataFault(f"{original!r} and another tensor are both {name!r}: the file mixes two ways of naming")
        if not name.startswith("vit.pooler."):
            result[name] = tensor
    return result


def with_pixio_names(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Returns an encoder's tensors under the names of Pixio's files; `with_standard_names` undoes it."""
    names = (name.removeprefix("vit.").replace("layernorm_before", "norm1") for name in tensors)
    return {
        name.replace("layernorm_after", "norm2"): tensor for name, tensor in zip(names, tensors.values(), strict=True)
    }
