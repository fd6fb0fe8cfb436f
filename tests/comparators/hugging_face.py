"""Hugging Face's ViTMAE in PyTorch, for `mae_dist.benchmark --against hf`.

It reads its options as the line `{"config": {…}, …}` and prints `ready`; for each further line `<n>` it prints the
seconds that n steps took.
"""

import json
import sys
import time
from typing import Any


def make_step(options: dict[str, Any]) -> Any:
    """Returns one training step with AdamW, or one forward pass of the encoder on whole images without gradients."""
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
    """Does a first step, then as many as each line of the input asks for."""
    step = make_step(options)
    step()
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.monotonic()
        for _ in range(int(line)):
            step()
        print(time.monotonic() - began, flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.stdin.readline()))
