"""A model's config as Hugging Face's transformers describes it."""

from typing import Any


def describe(model: Any, norm_pix_loss: bool) -> dict[str, Any]:
    """The section `config.model` as arguments of `transformers.ViTMAEConfig`."""

    def one(size: tuple[int, int]) -> int | list[int]:
        return size[0] if size[0] == size[1] else list(size)

    return {
        "hidden_size": model.embed_dim,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "intermediate_size": int(model.embed_dim * model.mlp_ratio),
        "hidden_act": "gelu" if model.gelu == "exact" else "gelu_pytorch_tanh",
        "layer_norm_eps": model.norm_eps,
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": 0.0,
        "image_size": one(model.image_size),
        "patch_size": one(model.patch_size),
        "num_channels": model.channels,
        "qkv_bias": model.qkv_bias,
        "decoder_hidden_size": model.decoder_embed_dim,
        "decoder_num_hidden_layers": model.decoder_depth,
        "decoder_num_attention_heads": model.decoder_num_heads,
        "decoder_intermediate_size": int(model.decoder_embed_dim * model.decoder_mlp_ratio),
        "mask_ratio": model.mask_ratio,
        "norm_pix_loss": norm_pix_loss,
    }
