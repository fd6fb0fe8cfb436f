"""Features of whole images as a pure function of parameters and images.

Shapes: B images, H W C image, (gh, gw) grid of patches, N tokens, D width.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from mae_dist import platforms
from mae_dist.cpu.microbatches import num_pieces
from mae_dist.errors import ConfigError
from mae_dist.evaluation.eval_step import make_eval_step
from mae_dist.model import autoencoder, layers
from mae_dist.model.build import Params, functional
from mae_dist.model.flops import forward_flops
from mae_dist.model.hooks import PLAIN, Hooks
from mae_dist.task_kinds import kind_of
from mae_dist.tasks.base import scale_pixels
from mae_dist.weights import pretrained

# Names of features -> names of what the encoder pools.
_POOLS = {"mean": "gap", "cls": "cls", "patches": "patches"}
KINDS = tuple(_POOLS)
Encode = Callable[[Params, jax.Array], dict[str, jax.Array]]


def make_encode(config: ConfigDict, kinds: Sequence[str], block: int | None = None, hooks: Hooks = PLAIN) -> Encode:
    """Returns a pure function of (parameters, images) that sees all patches and has nothing random.

    Args:
      config: of the model whose parameters it will be given; the group `encoder` is enough, but for a classifier that
        normalises what it pooled (`classify.norm_after_pool`), whose `mean` and `cls` need `head` too.
      kinds: which of `mean`, `cls` and `patches` to return.
      block: tokens as they leave this block, 1 the first, 0 before it, without a norm; None: the last, normalised.
      hooks: change how a platform computes it, see `model/hooks.py`.

    Returns:
      The function. Its images are uint8 in 0..255 or floating-point in 0..1, (B, H, W, C). Its result has float32
      `mean` (B, D), the mean over patches; `cls` (B, D), the mean of the class tokens; `patches` (B, gh, gw, D).

    Raises:
      ConfigError: a kind or block that the model does not have.
    """
    model = config.model
    for kind in kinds:
        check_kind(kind)
    if "cls" in kinds and not layers.count_cls_tokens(model.cls_token, model.cls_tokens):
        raise ConfigError("'cls' features need a class token and the model has none; choose 'mean' or 'patches'")
    if block is not None and not 0 <= block <= model.depth:
        raise ConfigError(f"block {block}: the encoder has blocks 1 to {model.depth}, and 0 is what enters the first")
    norm_in_head = _norm_in_head(config)

    make = functools.partial(autoencoder.MaskedAutoencoder, **model.to_dict(), final_norm=not norm_in_head, hooks=hooks)
    bind = functional(lambda rngs: make(rngs=rngs).encoder).bind
    bind_norm = functional(lambda rngs: nnx.LayerNorm(model.embed_dim, epsilon=model.norm_eps, rngs=rngs)).bind

    def encode(params: Params, images: jax.Array) -> dict[str, jax.Array]:
        pools = [_POOLS[kind] for kind in kinds]
        values = bind(params["encoder"]).features(scale(images, config), pools, num_blocks=block)
        result = {kind: values[_POOLS[kind]].astype(jnp.float32) for kind in kinds}
        if norm_in_head and block is None:
            normed = [kind for kind in kinds if kind != "patches"]
            result |= {kind: bind_norm(params["head"]["norm"])(result[kind]) for kind in normed}
        return result

    return encode


def make_feature_step(
    config: ConfigDict, mesh: Mesh, shardings: PyTree, batch_size: int, kinds: Sequence[str], block: int | None = None
) -> jax.stages.Wrapped:
    """Compiles (params, batch) -> features, split over examples like the batch; otherwise as `make_encode`.

    `shardings` are those of the parameters it is given, `batch_size` the images of all devices together.
    """
    matmul = platforms.choose_matmul(config, mesh, forward_flops(config))
    encode = make_encode(config, kinds, block, platforms.make_hooks(mesh, matmul))
    return make_eval_step(
        lambda params, batch: encode(params, batch["image"]),
        mesh=mesh,
        params=shardings,
        per_example=True,
        pieces=num_pieces(config, mesh, batch_size),
    )


def check_kind(kind: object) -> None:
    """Raises a `ConfigError` if there are no such features."""
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"there are no {kind!r} features; choose of {', '.join(KINDS)}")


def _norm_in_head(config: ConfigDict) -> bool:
    return kind_of(config).finetunes and config.classify.norm_after_pool


def scale(images: jax.Array, config: ConfigDict) -> jax.Array:
    """Scales images, uint8 in 0..255 or floating-point in 0..1 (B, H, W, C), as the model expects them: float32."""
    return scale_pixels(images, config.data)


def needed_shapes(source: pretrained.Pretrained) -> pretrained.Params:
    """Returns the shapes of the parameters that `make_encode`'s function reads, by group."""
    if not _norm_in_head(source.config):
        return {"encoder": source.abstract["encoder"]}
    if "head" not in source.abstract:
        raise ConfigError(
            f"{source.origin} was fine-tuned with classify.norm_after_pool, so that its features need the norm in its "
            "head, and it has no head; convert it without --encoder_only"
        )
    return {group: source.abstract[group] for group in ("encoder", "head")}
