"""Chooses the number of microbatches per CPU device."""

import math

from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_dist.cpu import cores
from mae_dist.model import flops, layers, patches
from mae_dist.parallel.shardings import is_by_cores


def num_pieces(
    config: ConfigDict,
    mesh: Mesh,
    images: int,
    num_patches: int | None = None,
    *,
    decoder: bool = False,
    update: bool = False,
    rows_together: int = 1,
) -> int:
    """Chooses how many microbatches each device computes; 1 unless the devices are a CPU's cores, data-parallel.

    Args:
      config: validated.
      mesh: the devices.
      images: of all devices together.
      num_patches: patches of an image that the encoder sees; None for all.
      decoder: True if the decoder runs too.
      update: True if gradients are computed.
      rows_together: see `tasks.base.Task`; a microbatch holds whole groups.
    """
    if not is_by_cores(mesh):
        return 1
    model = config.model
    num_cls = layers.count_cls_tokens(model.cls_token, model.cls_tokens)
    length = math.prod(patches.grid_size(model.image_size, model.patch_size))
    seen = length if num_patches is None else num_patches
    sizes = [(seen + num_cls, seen + num_cls, model.embed_dim, model.num_heads, model.mlp_ratio)]
    if decoder:
        tokens = flops.decoder_tokens(model, num_patches)
        sizes.append((*tokens, model.decoder_embed_dim, model.decoder_num_heads, model.decoder_mlp_ratio))
    largest = max(
        flops.activation_bytes(num_tokens=tokens, num_keys=keys, embed_dim=width, num_heads=heads, mlp_ratio=ratio)
        for tokens, keys, width, heads, ratio in sizes
    )
    return cores.num_pieces(
        images // mesh.size // rows_together,
        largest * rows_together,
        (seen + num_cls) * rows_together if update else 0,
    )
