"""Hugging Face's ViTMAE in PyTorch, for `mae_dist.benchmark --against hf`.

On a GPU or the CPU. It reads its options as the line `{"config": {…}, …}` and prints `ready`; for each further line
`<n>` it prints the seconds that n steps took.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any


def make_step(options: dict[str, Any]) -> Any:
    """Returns one training step with AdamW, or one forward pass of the encoder on whole images without gradients.

    As fast as PyTorch offers: its fused attention and optimizer, TF32 for what stays float32 on a GPU.
    """
    import torch
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    device = options["device"]
    torch.set_num_threads(options["threads"])
    torch.manual_seed(0)
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    config: dict[str, Any] = {**options["config"], "attn_implementation": "sdpa"}
    model: Any = ViTMAEForPreTraining(ViTMAEConfig(**config))
    model.to(device)
    images = torch.rand(options["batch_size"], *options["image_shape"], device=device)
    mixed = torch.autocast(device, torch.bfloat16, enabled=options["bfloat16"])
    if options["what"] == "features":
        encoder = torch.compile(model.vit) if options["compiled"] else model.vit

        def features() -> None:
            with torch.no_grad(), mixed:
                encoder(images)

        return features
    forward = torch.compile(model) if options["compiled"] else model
    options_of_adamw: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.05}
    optimizer = torch.optim.AdamW(model.parameters(), **options_of_adamw, fused=device == "cuda" or None)

    def train() -> None:
        optimizer.zero_grad()
        with mixed:
            loss = forward(images).loss
        loss.backward()
        optimizer.step()

    return train


def serve(options: dict[str, Any]) -> None:
    """Does a first step, then as many as each line of the input asks for."""
    step = make_step(options)
    wait = _waiter(options["device"])
    step()
    wait()
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.monotonic()
        for _ in range(int(line)):
            step()
        wait()
        print(time.monotonic() - began, flush=True)


def _waiter(device: str) -> Callable[[], None]:
    """Returns what waits until all steps are computed; a CPU's are when their function returns."""
    if device == "cpu":
        return lambda: None
    import torch

    return torch.cuda.synchronize


if __name__ == "__main__":
    serve(json.loads(sys.stdin.readline()))
