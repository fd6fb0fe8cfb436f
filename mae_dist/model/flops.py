"""Analytic FLOPs per image, from which MFU is computed with the peak of a device (`hardware`).

A multiply-add is 2 FLOPs. Only matmuls are counted (over 99 % of the work of a transformer); a backward pass
is 2 forward passes; recomputation by rematerialisation is not counted. XLA's own `cost_analysis` is no substitute: it
counts the body of a scanned stack once.

Shapes: N tokens, D width of the encoder, Q queries of a cross decoder, E its width.
"""

import itertools
import math

from ml_collections import ConfigDict

from mae_dist.model import layers, masking, patches
from mae_dist.task_kinds import kind_of


def stack_forward_flops(*, num_tokens: int, embed_dim: int, depth: int, mlp_ratio: float) -> float:
    """Counts the forward FLOPs of `depth` blocks over one sequence; the number of heads does not matter."""
    projections = 4 * 2 * num_tokens * embed_dim**2  # q, k, v and out, (N, D) @ (D, D) each
    attention = 2 * 2 * num_tokens**2 * embed_dim  # scores and weighted values
    mlp = 2 * 2 * num_tokens * embed_dim * (mlp_ratio * embed_dim)
    return depth * (projections + attention + mlp)


def activation_bytes(
    *, num_tokens: int, embed_dim: int, num_heads: int, mlp_ratio: float, num_keys: int | None = None
) -> int:
    """Counts the bytes of the largest float32 arrays that one image's forward pass through a block holds at once.

    These are the input and output of the widest matmul, and the attention scores. `num_keys` is how many tokens each
    attends to; None for all `num_tokens`.
    """
    widest = embed_dim + max(3 * embed_dim, int(mlp_ratio * embed_dim))
    return 4 * (num_tokens * widest + num_heads * num_tokens * (num_tokens if num_keys is None else num_keys))


def encoder_forward_flops(model: ConfigDict, num_patches: int) -> float:
    """Counts the forward FLOPs of the encoder over `num_patches` patches of one image (in pretraining K)."""
    patch_embed = 2 * num_patches * math.prod(model.patch_size) * model.channels * model.embed_dim
    return patch_embed + stack_forward_flops(
        num_tokens=num_patches + _count_cls(model),
        embed_dim=model.embed_dim,
        depth=model.depth,
        mlp_ratio=model.mlp_ratio,
    )


def decoder_tokens(model: ConfigDict, num_kept: int | None) -> tuple[int, int]:
    """Returns how many tokens each block of the decoder computes for one image, and to how many each attends.

    Args:
      model: the section `config.model`.
      num_kept: patches that the encoder sees in a training step; None for an evaluation, which predicts all patches.
        Attention is then to all as well, an upper bound.
    """
    num_patches = _count_patches(model)
    if model.decoder == "full":
        return num_patches + _count_cls(model), num_patches + _count_cls(model)
    if num_kept is None:
        return num_patches, num_patches + _count_cls(model)
    predicted = masking.count_predicted(num_patches - num_kept, model.predict_ratio)
    return predicted, num_kept + _count_cls(model)


def _cross_decoder_forward_flops(model: ConfigDict, num_kept: int) -> float:
    """Counts the forward FLOPs of the cross decoder in a training step."""
    width = model.decoder_embed_dim
    queries, keys = decoder_tokens(model, num_kept)
    block = (
        2 * 2 * queries * width**2  # q and out, (Q, E) @ (E, E) each
        + 2 * 2 * keys * model.embed_dim * width  # k and v, (N, D) @ (D, E) each
        + 2 * 2 * queries * keys * width  # scores and weighted values
        + 2 * 2 * queries * width * (model.decoder_mlp_ratio * width)
    )
    if model.fuse_blocks:
        block += 2 * (model.depth + 1) * keys * model.embed_dim  # the sum of the encoder's outputs
    pred = 2 * queries * width * math.prod(model.patch_size) * model.channels
    return model.decoder_depth * block + pred


def _decoder_forward_flops(model: ConfigDict, num_kept: int) -> float:
    """Counts the forward FLOPs of the decoder; the full one embeds the kept patches and predicts all."""
    if model.decoder == "cross":
        return _cross_decoder_forward_flops(model, num_kept)
    num_patches, width = _count_patches(model), model.decoder_embed_dim
    embed = 2 * (num_kept + _count_cls(model)) * model.embed_dim * width
    pred = 2 * num_patches * width * math.prod(model.patch_size) * model.channels
    blocks = stack_forward_flops(
        num_tokens=num_patches + _count_cls(model),
        embed_dim=width,
        depth=model.decoder_depth,
        mlp_ratio=model.decoder_mlp_ratio,
    )
    return embed + pred + blocks


def attention_forward_flops(config: ConfigDict, num_kept: int) -> float:
    """Counts the forward FLOPs of scores and weighted values alone, for one image of a training step."""
    model = config.model
    total = 4.0 * model.depth * (num_kept + _count_cls(model)) ** 2 * model.embed_dim
    if kind_of(config).has_decoder:
        queries, keys = decoder_tokens(model, num_kept)
        total += 4 * model.decoder_depth * queries * keys * model.decoder_embed_dim
    return total


def _count_cls(model: ConfigDict) -> int:
    return layers.count_cls_tokens(model.cls_token, model.cls_tokens)


def _count_patches(model: ConfigDict) -> int:
    return math.prod(patches.grid_size(model.image_size, model.patch_size))


def forward_flops(config: ConfigDict) -> float:
    """Counts the forward FLOPs of the encoder on all patches of an image."""
    return encoder_forward_flops(config.model, _count_patches(config.model))


def count_kept_patches(config: ConfigDict) -> int:
    """Counts the patches of an image that the encoder sees in training."""
    model = config.model
    if not kind_of(config).has_decoder:
        return _count_patches(model)
    return masking.count_kept(
        strategy=model.masking,
        grid=patches.grid_size(model.image_size, model.patch_size),
        mask_ratio=model.mask_ratio,
        mask_file=model.mask_file,
        mask_block=model.mask_block,
    )


def encoder_passes_of(config: ConfigDict) -> int:
    """Returns `Job.encoder_passes`; a frozen encoder without augmentation gives the same features every epoch."""
    if kind_of(config).trains_encoder:
        return 3
    return 0 if config.data.augment == "none" else 1


def train_flops_per_image(config: ConfigDict, num_classes: int, num_kept: int, encoder_passes: int) -> float:
    """Counts the FLOPs of one training step per image.

    Args:
      config: validated.
      num_classes: of the data set; a classifier's head has as many outputs.
      num_kept: patches that the encoder of a pretraining sees, `count_kept_patches`.
      encoder_passes: of a classifier, in forward passes, see `encoder_passes_of`.
    """
    if kind_of(config).has_decoder:
        return 3 * (encoder_forward_flops(config.model, num_kept) + _decoder_forward_flops(config.model, num_kept))
    hidden = (config.classify.hidden_dim,) if config.classify.head == "mlp" else ()
    widths = (config.model.embed_dim, *hidden, num_classes)
    head = sum(2 * fan_in * fan_out for fan_in, fan_out in itertools.pairwise(widths))
    return encoder_passes * forward_flops(config) + 3 * head
