"""Hugging Face's ViTMAE in PyTorch: how it describes a model of ours, and a process that does its steps when told to.

`python -m mae_dist.benchmark.hugging_face '{"config": {…}, …}'` prints `ready <compile seconds>`, and after each line
`<n>` of its input the seconds that n steps took. It imports neither JAX nor anything of mae_dist.
"""

import json
import sys
import time
from typing import Any


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
