"""Chooses the microbatches of a step by an accelerator's memory."""

from typing import Any

import jax
from ml_collections import ConfigDict

from mae_dist.errors import ConfigError
from mae_dist.model import flops
from mae_dist.task_kinds import kind_of

_USABLE = 0.8  # of the memory: the estimate below leaves out buffers of collectives and of the input
# Bytes that a block keeps for its backward pass in 16 bits, per token and unit of width, and per attention score
# (Korthikanti et al. 2022, table 2).
_PER_WIDTH, _PER_SCORE = 34, 5
# The same where attention is to the encoder's tokens: bytes per token and unit of the decoder's width for keys and
# values, and per token and unit of the encoder's width for a sum of its blocks and that sum normalised.
_PER_KEY, _PER_FUSED = 4, 4
# The TPU compiler's sum for ViT-B/16 in bfloat16 on a v5e is 181 MB an image, even with remat: 2.6 times that count.
# Too many microbatches cost little, too few end the run.
_SAFETY = 3.0


def choose_accum_steps(config: ConfigDict, num_kept: int, state_bytes: int, num_shards: int, device: Any) -> int:
    """Returns the fewest microbatches whose activations should fit; 1 where the device does not tell its memory.

    Args:
      config: validated, with its batch size.
      num_kept: patches that the encoder sees.
      state_bytes: of parameters and moments on a device.
      num_shards: parts into which the devices divide a batch.
      device: one of them.

    Raises:
      ConfigError: not even one image of each shard should fit.
    """
    limit = _memory(device)
    if limit is None:
        return 1
    images = config.global_batch_size // num_shards
    room = _USABLE * limit - 1.5 * state_bytes  # gradients besides
    for steps in (n for n in range(1, images + 1) if images % n == 0):
        if images // steps * activation_bytes(config, num_kept) <= room:
            return steps
    raise ConfigError(
        f"accum_steps=0: one image of global_batch_size={config.global_batch_size} should need "
        f"{activation_bytes(config, num_kept) / 2**30:.1f} GiB, and {device.device_kind} has {limit / 2**30:.1f} GiB; "
        "set accum_steps and model.remat='blocks' yourself, or choose a smaller model"
    )


def _memory(device: Any) -> int | None:
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # a device that is only described
        return None


def activation_bytes(config: ConfigDict, num_kept: int) -> float:
    """Estimates the bytes that an image's forward pass keeps for the backward pass."""
    model = config.model
    has_cls = int(model.cls_token != "none")
    size = 2 if model.dtype == "bfloat16" else 4
    stacks = [(num_kept + has_cls, num_kept + has_cls, model.embed_dim, model.num_heads, model.depth)]
    if kind_of(config).has_decoder:
        tokens = flops.decoder_tokens(model, num_kept)
        stacks.append((*tokens, model.decoder_embed_dim, model.decoder_num_heads, model.decoder_depth))
    kept = sum(
        depth * (_PER_WIDTH * tokens * width + _PER_SCORE * heads * tokens * keys)
        for tokens, keys, width, heads, depth in stacks
    )
    if kind_of(config).has_decoder and model.decoder == "cross":
        per_token = _PER_KEY * model.decoder_embed_dim + (_PER_FUSED * model.embed_dim if model.fuse_blocks else 0)
        kept += model.decoder_depth * (num_kept + has_cls) * per_token
    return _SAFETY * kept * size / 2
