"""Analytic FLOPs per image, from which MFU is computed with the peak of a device (`hardware`).

A multiply-add is 2 FLOPs. Only matmuls are counted (over 99 % of the work of a transformer); a backward pass
is 2 forward passes; recomputation by rematerialisation is not counted. XLA's own `cost_analysis` is no substitute: it
counts the body of a scanned stack once.

Shapes: N tokens, D width.
"""

import itertools
import math
from collections.abc import Sequence

from ml_collections import ConfigDict

from mae_dist.model import masking, patches
from mae_dist.task_kinds import kind_of


def stack_forward_flops(*, num_tokens: int, embed_dim: int, depth: int, mlp_ratio: float) -> float:
    """Counts the forward FLOPs of `depth` blocks over one sequence; the number of heads does not matter."""
    projections = 4 * 2 * num_tokens * embed_dim**2  # q, k, v and out, (N, D) @ (D, D) each
    attention = 2 * 2 * num_tokens**2 * embed_dim  # scores and weighted values
    mlp = 2 * 2 * num_tokens * embed_dim * (mlp_ratio * embed_dim)
    return depth * (projections + attention + mlp)


def activation_bytes(*, num_tokens: int, embed_dim: int, num_heads: int, mlp_ratio: float) -> int:
    """Counts the bytes of the largest float32 arrays that one image's forward pass through a block holds at once.

    These are the input and output of the widest matmul, and the attention scores.
    """
    widest = embed_dim + max(3 * embed_dim, int(mlp_ratio * embed_dim))
    return 4 * (num_tokens * widest + num_heads * num_tokens**2)


def encoder_forward_flops(
    *,
    patch_size: tuple[int, int],
    channels: int,
    embed_dim: int,
    depth: int,
    mlp_ratio: float,
    num_patches: int,
    cls_token: bool,
) -> float:
    """Counts the forward FLOPs of the encoder over `num_patches` patches of one image (in pretraining K)."""
    patch_embed = 2 * num_patches * math.prod(patch_size) * channels * embed_dim
    return patch_embed + stack_forward_flops(
        num_tokens=num_patches + int(cls_token), embed_dim=embed_dim, depth=depth, mlp_ratio=mlp_ratio
    )


def _count_patches(image_size: tuple[int, int], patch_size: tuple[int, int]) -> int:
    assert image_size[0] % patch_size[0] == 0 == image_size[1] % patch_size[1], (image_size, patch_size)
    return (image_size[0] // patch_size[0]) * (image_size[1] // patch_size[1])


def mae_train_flops_per_image(
    *,
    image_size: tuple[int, int],
    patch_size: tuple[int, int],
    channels: int,
    embed_dim: int,
    depth: int,
    mlp_ratio: float,
    decoder_embed_dim: int,
    decoder_depth: int,
    decoder_mlp_ratio: float,
    num_keep: int,
    cls_token: bool,
) -> float:
    """Counts the FLOPs of one pretraining step per image: encoder on `num_keep` patches, decoder on all.

    Sizes are (height, width) in pixels. The patch embedding and the decoder's embedding see the kept patches only, and
    the prediction head all patches without the class token.
    """
    num_patches = _count_patches(image_size, patch_size)
    encoder = encoder_forward_flops(
        patch_size=patch_size,
        channels=channels,
        embed_dim=embed_dim,
        depth=depth,
        mlp_ratio=mlp_ratio,
        num_patches=num_keep,
        cls_token=cls_token,
    )
    decoder_embed = 2 * (num_keep + int(cls_token)) * embed_dim * decoder_embed_dim
    decoder = stack_forward_flops(
        num_tokens=num_patches + int(cls_token),
        embed_dim=decoder_embed_dim,
        depth=decoder_depth,
        mlp_ratio=decoder_mlp_ratio,
    )
    pred = 2 * num_patches * decoder_embed_dim * math.prod(patch_size) * channels
    return 3 * (encoder + decoder_embed + decoder + pred)


def classifier_train_flops_per_image(
    *,
    image_size: tuple[int, int],
    patch_size: tuple[int, int],
    channels: int,
    embed_dim: int,
    depth: int,
    mlp_ratio: float,
    num_classes: int,
    cls_token: bool,
    encoder_passes: int,
    head_hidden_dims: Sequence[int] = (),
) -> float:
    """Counts the FLOPs of one classifier training step per image: encoder on all patches, head on pooled features.

    `encoder_passes` counts the encoder in forward passes: 3 where it is trained, 1 where it is frozen, 0 where its
    features are cached. `head_hidden_dims` are the hidden widths of an MLP head, none for a linear one.
    """
    encoder = encoder_forward_flops(
        patch_size=patch_size,
        channels=channels,
        embed_dim=embed_dim,
        depth=depth,
        mlp_ratio=mlp_ratio,
        num_patches=_count_patches(image_size, patch_size),
        cls_token=cls_token,
    )
    widths = (embed_dim, *head_hidden_dims, num_classes)
    head = sum(2 * fan_in * fan_out for fan_in, fan_out in itertools.pairwise(widths))
    return encoder_passes * encoder + 3 * head


def forward_flops(config: ConfigDict) -> float:
    """Counts the forward FLOPs of the encoder on all patches of an image."""
    model = config.model
    return encoder_forward_flops(
        patch_size=model.patch_size,
        channels=model.channels,
        embed_dim=model.embed_dim,
        depth=model.depth,
        mlp_ratio=model.mlp_ratio,
        num_patches=math.prod(patches.grid_size(model.image_size, model.patch_size)),
        cls_token=model.cls_token != "none",
    )


def count_kept_patches(config: ConfigDict) -> int:
    """Counts the patches of an image that the encoder sees in training."""
    model = config.model
    rows, columns = patches.grid_size(model.image_size, model.patch_size)
    if not kind_of(config).has_decoder:
        return rows * columns
    return masking.count_kept(
        strategy=model.masking,
        grid=(rows, columns),
        mask_ratio=model.mask_ratio,
        mask_file=model.mask_file,
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
      encoder_passes: of a classifier, see `encoder_passes_of`.
    """
    model = config.model
    shape = {name: model[name] for name in ("image_size", "patch_size", "channels", "embed_dim", "depth", "mlp_ratio")}
    shape["cls_token"] = model.cls_token != "none"
    if not kind_of(config).has_decoder:
        hidden = (config.classify.hidden_dim,) if config.classify.head == "mlp" else ()
        return classifier_train_flops_per_image(
            **shape, num_classes=num_classes, head_hidden_dims=hidden, encoder_passes=encoder_passes
        )
    decoder = {name: model[name] for name in ("decoder_embed_dim", "decoder_depth", "decoder_mlp_ratio")}
    return mae_train_flops_per_image(**shape, **decoder, num_keep=num_kept)
