"""Hugging Face's ViTMAE: how it describes a model of ours, and a process that does its steps when told to.

`python -m mae_dist.hugging_face '{"config": {…}, …}'` prints `ready <compile seconds>`, and after each line `<n>` on
its input the seconds that n steps took; `mae_dist.benchmark` compares with it. It
imports neither JAX nor anything of mae_dist.
"""

import json
import sys
import time
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


def make_step(options: dict[str, Any]) -> Any:
    """One training step with AdamW, or one forward pass of the encoder on whole images without gradients."""
    import torch
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    torch.set_num_threads(options["threads"])
    torch.manual_seed(0)
    model = ViTMAEForPreTraining(ViTMAEConfig(**options["config"]))
    images = torch.rand(options["batch_size"], *options["image_shape"])
    if options["what"] == "features":
        encoder = torch.compile(model.vit) if options["compiled"] else model.vit

        def features() -> None:
            with torch.no_grad():
                encoder(images)

        return features
    forward = torch.compile(model) if options["compiled"] else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)

    def train() -> None:
        optimizer.zero_grad()
        forward(images).loss.backward()
        optimizer.step()

    return train


def serve(options: dict[str, Any]) -> None:
    """Warms up, then obeys."""
    step = make_step(options)
    began = time.monotonic()
    step()
    print(f"ready {time.monotonic() - began}", flush=True)
    for line in sys.stdin:
        began = time.monotonic()
        for _ in range(int(line)):
            step()
        print(time.monotonic() - began, flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
