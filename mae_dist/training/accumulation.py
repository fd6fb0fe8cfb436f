"""Chooses microbatches, or what the backward pass recomputes, by an accelerator's memory."""

from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_dist import hardware
from mae_dist.errors import ConfigError
from mae_dist.model import flops, layers
from mae_dist.parallel.shardings import num_batch_shards
from mae_dist.task_kinds import kind_of

_USABLE = 0.8  # of the memory: the estimate below leaves out buffers of collectives and of the input
# Bytes that a block keeps for its backward pass in 16 bits, per token and unit of width, and per attention score
# (Korthikanti et al. 2022, table 2).
_PER_WIDTH, _PER_SCORE = 34, 5
# The same where matmuls' results are kept only (queries, keys, values, attention's output, two of the MLP, whose inner
# one is four times as wide) or nothing but the block's input, which both keep.
_PER_WIDTH_OF = {"dots": 20, "blocks": 2}
# Where attention is to the encoder's tokens: bytes per token and unit of the decoder's width for keys and values, and
# per token and unit of the encoder's width for a sum of its blocks and that sum normalised.
_PER_KEY, _PER_FUSED = 4, 4
# The TPU compiler's sum for ViT-B/16 in bfloat16 on a v5e is 181 MB an image, even with remat: 2.6 times that count.
# For ViT-L/16 it is about 210 MB, 2.1 times, and with "dots" 60 MB, 1.5 times. Too many microbatches cost little, too
# few end the run.
_SAFETY = {"none": 3.0, "dots": 2.0, "blocks": 2.0}


def fit_memory(config: ConfigDict, mesh: Mesh, num_params: int, num_kept: int, encoder_passes: int) -> None:
    """Sets microbatches and what is recomputed, where the config leaves them to the memory of the mesh's devices.

    Args:
      config: validated, with its batch size; `accum_steps` 0 and `model.remat` "auto" are replaced.
      mesh: the devices.
      num_params: of the whole model.
      num_kept: patches that the encoder sees.
      encoder_passes: of a step, see `Job`: a frozen encoder keeps nothing for a backward pass.
    """
    if config.accum_steps and config.model.remat != "auto":
        return
    copies = 1 if config.optim.shard_state else mesh.shape["data"]
    state_bytes = 16 * num_params * copies // mesh.size
    known = num_kept, state_bytes, num_batch_shards(mesh), mesh.devices.flat[0]
    if config.model.remat == "auto":
        by_memory = config.accum_steps and encoder_passes == 3
        config.model.remat = choose_remat(config, *known) if by_memory else "none"
    if not config.accum_steps:
        config.accum_steps = choose_accum_steps(config, *known)


def choose_remat(config: ConfigDict, num_kept: int, state_bytes: int, num_shards: int, device: Any) -> str:
    """Returns what to recompute for a microbatch's activations to fit: the first of none, dots and blocks that does.

    `none` where the device does not tell its memory; `blocks` if nothing should fit. Arguments as of
    `choose_accum_steps`, with the config's own number of microbatches.
    """
    limit = _memory(device)
    images = config.global_batch_size // (num_shards * config.accum_steps)
    for remat in ("none", "dots"):
        if limit is None or images * activation_bytes(config, num_kept, remat) <= _room(limit, state_bytes):
            return remat
    return "blocks"


def _room(limit: int, state_bytes: int) -> float:
    return _USABLE * limit - 1.5 * state_bytes  # gradients besides


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
    room = _room(limit, state_bytes)
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
        return hardware.hbm_bytes(device.device_kind)


def activation_bytes(config: ConfigDict, num_kept: int, remat: str = "none") -> float:
    """Estimates the bytes that an image's forward pass keeps for the backward pass, and one block recomputes."""
    model = config.model
    num_cls = layers.count_cls_tokens(model.cls_token, model.cls_tokens)
    size = 2 if model.dtype == "bfloat16" else 4
    stacks = [(num_kept + num_cls, num_kept + num_cls, model.embed_dim, model.num_heads, model.depth)]
    if kind_of(config).has_decoder:
        tokens = flops.decoder_tokens(model, num_kept)
        stacks.append((*tokens, model.decoder_embed_dim, model.decoder_num_heads, model.decoder_depth))
    of_block = [
        _PER_WIDTH * tokens * width + _PER_SCORE * heads * tokens * keys for tokens, keys, width, heads, _ in stacks
    ]
    if remat == "none":
        kept = sum(block * depth for block, (*_, depth) in zip(of_block, stacks, strict=True))
    else:
        per_width = _PER_WIDTH_OF[remat]
        kept = max(of_block) + sum(depth * per_width * tokens * width for tokens, _, width, _, depth in stacks)
    if kind_of(config).has_decoder and model.decoder == "cross":
        per_token = _PER_KEY * model.decoder_embed_dim + (_PER_FUSED * model.embed_dim if model.fuse_blocks else 0)
        kept += model.decoder_depth * (num_kept + num_cls) * per_token
    return _SAFETY[remat] * kept * size / 2
