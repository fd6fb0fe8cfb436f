"""The config.json of Hugging Face's transformers (`ViTMAEConfig`, `ViTConfig`, `PixioConfig`) and `config.model`."""

import math
from collections.abc import Container
from typing import Any

from ml_collections import ConfigDict

MODEL_TYPES = ("vit_mae", "vit", "pixio")  # of config.json

# Their name, ours, and the default there, which their files leave out.
_FIELDS = (
    ("hidden_size", "embed_dim", 768),
    ("num_hidden_layers", "depth", 12),
    ("num_attention_heads", "num_heads", 12),
    ("layer_norm_eps", "norm_eps", 1e-12),
    ("hidden_dropout_prob", "dropout", 0.0),
    ("num_channels", "channels", 3),
    ("qkv_bias", "qkv_bias", True),
)
_DECODER_FIELDS = (
    ("decoder_hidden_size", "decoder_embed_dim", 512),
    ("decoder_num_hidden_layers", "decoder_depth", 8),
    ("decoder_num_attention_heads", "decoder_num_heads", 16),
    ("mask_ratio", "mask_ratio", 0.75),
)
_SIZES = (("image_size", 224), ("patch_size", 16))
# The defaults of `PixioConfig` where they are others.
_OF_PIXIO = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "layer_norm_eps": 1e-6}
_GELUS = {"gelu": "exact", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh"}


def architecture(groups: Container[str], layout: str) -> str:
    """Returns the class of transformers for parameters with these groups, in the layout `hf` or `pixio`."""
    if layout == "pixio":
        return "PixioModel"
    if "decoder" in groups:
        return "ViTMAEForPreTraining"
    return "ViTForImageClassification" if "head" in groups else "ViTMAEModel"


def _describe_encoder(model: ConfigDict) -> dict[str, Any]:
    """Returns the encoder as arguments that all these classes of configs take."""
    sizes = {name: model[name] for name, _ in _SIZES}
    return {
        **{theirs: model[ours] for theirs, ours, _ in _FIELDS},
        **{name: size[0] if size[0] == size[1] else list(size) for name, size in sizes.items()},
        "hidden_act": next(theirs for theirs, ours in _GELUS.items() if ours == model.gelu),
        "attention_probs_dropout_prob": 0.0,
    }


def describe_pixio(model: ConfigDict) -> dict[str, Any]:
    """Returns the encoder of `config.model` as arguments of `transformers.PixioConfig`."""
    return {**_describe_encoder(model), "mlp_ratio": int(model.mlp_ratio), "n_cls_tokens": model.cls_tokens}


def describe(config: ConfigDict, has_decoder: bool) -> dict[str, Any]:
    """Returns the model of a config as arguments of `transformers.ViTMAEConfig`, or without decoder of `ViTConfig`."""
    model = config.model
    described = {**_describe_encoder(model), "intermediate_size": int(model.embed_dim * model.mlp_ratio)}
    if has_decoder:
        described |= {theirs: model[ours] for theirs, ours, _ in _DECODER_FIELDS}
        described["decoder_intermediate_size"] = int(model.decoder_embed_dim * model.decoder_mlp_ratio)
        described["norm_pix_loss"] = config.pretrain.norm_pix_loss
    return described


def read(stored: dict[str, Any], kind: str) -> dict[str, Any]:
    """Returns the fields of `config.model` that a config.json of this `model_type` names.

    Raises:
      KeyError, TypeError, ValueError, ArithmeticError: it describes no model.
    """
    act = stored.get("hidden_act", "gelu")
    if act not in _GELUS:
        raise ValueError(f"hidden_act {act!r} is not one of {', '.join(_GELUS)}")
    named = (*_FIELDS, *(_DECODER_FIELDS if kind == "vit_mae" else ()))
    if kind == "pixio":
        stored = {**_OF_PIXIO, "image_size": 256, **stored}
    fields: dict[str, Any] = {ours: type(default)(stored.get(theirs, default)) for theirs, ours, default in named}
    for name, default in _SIZES:
        size = stored.get(name, default)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        fields[name] = int(height), int(width)
    fields |= {"gelu": _GELUS[act], "cls_tokens": 1}
    if kind == "pixio":
        return fields | {
            "mlp_ratio": float(stored.get("mlp_ratio", 4)),
            "cls_tokens": int(stored.get("n_cls_tokens", 8)),
        }
    fields["mlp_ratio"] = ratio(int(stored.get("intermediate_size", 3072)), fields["embed_dim"])
    if kind == "vit_mae":
        hidden = int(stored.get("decoder_intermediate_size", 2048))
        fields["decoder_mlp_ratio"] = ratio(hidden, fields["decoder_embed_dim"])
    return fields


def ratio(hidden: int, dim: int) -> float:
    """Returns the mlp_ratio whose int(dim * ratio) is `hidden`, also where the quotient is rounded down."""
    quotient = hidden / dim
    return quotient if int(dim * quotient) == hidden else math.nextafter(quotient, math.inf)
