"""Pretraining: reconstruct the removed patches.

Shapes: B batch, H W C image, L patches, K kept patches, P values of one patch, D encoder width.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from clu import metrics as clu_metrics
from jaxtyping import Array, Float, Int, UInt
from ml_collections import ConfigDict

from mae_dist.checkpoint.digests import checksum
from mae_dist.model import patches
from mae_dist.model.build import Params, functional, make_model
from mae_dist.model.hooks import Hooks
from mae_dist.tasks import losses
from mae_dist.tasks.base import Batch, Task, scale_pixels, unscale_pixels


def make_pretrain(
    config: ConfigDict,
    hooks: Hooks,
    error: Callable[[jax.Array, jax.Array], jax.Array] = optax.squared_error,
) -> Task:
    """Returns the task of a masked autoencoder; `error` is (pred, target) (…, P) -> (…, P), averaged to the loss."""
    norm_pix_loss = config.pretrain.norm_pix_loss
    abstract, init, bind = functional(functools.partial(make_model, config, 0, hooks))

    def forward(params: Params, batch: Batch, mask_keys: jax.Array) -> Any:
        model = bind(params)
        ids_shuffle, kept = model.draw_ids_shuffle(mask_keys)
        return model(scale_pixels(batch["image"], config.data), ids_shuffle, kept, None)

    def target(true: jax.Array) -> jax.Array:
        return losses.normalize_patches(true) if norm_pix_loss else true

    def loss(params: Params, batch: Batch, keys: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = bind(params)
        ids_shuffle, kept = model.draw_ids_shuffle(keys)
        images = scale_pixels(batch["image"], config.data)
        pred, true = model.removed_patches(images, ids_shuffle, kept, keys)  # (B, L - K, P)
        traced = {"trace": _trace(batch["image"], ids_shuffle)} if config.trace else {}
        return error(pred, target(true)).mean(axis=(1, 2)), traced

    def fixed_keys(batch: Batch) -> jax.Array:
        """Returns keys (B,) that give an example of a split the same mask at every evaluation, on any devices."""
        index = batch["index"]
        seeds = batch["seed"] if "seed" in batch else jnp.full(index.shape, config.seed, jnp.uint32)
        return jax.vmap(lambda seed, i: jax.random.fold_in(jax.random.key(seed), i))(seeds, index)

    def evaluate(params: Params, batch: Batch) -> dict[str, clu_metrics.Metric]:
        pred, true, mask = forward(params, batch, fixed_keys(batch))
        values = losses.masked_pixel_loss(pred, target(true), mask, error)
        return {"loss": clu_metrics.Average.from_model_output(values, batch["weight"] > 0)}

    def features(params: Params, batch: Batch) -> jax.Array:
        pool = config.classify.pool
        return bind(params).encoder.features(scale_pixels(batch["image"], config.data), (pool,))[pool]

    def reconstruct(params: Params, batch: Batch) -> dict[str, jax.Array]:
        return make_pictures(config, *forward(params, batch, fixed_keys(batch)))

    return Task(
        name=config.task,
        abstract_params=abstract,
        init_params=init,
        loss=loss,
        evaluate=evaluate,
        features=features,
        reconstruct=reconstruct,
    )


def _trace(images: UInt[Array, "B H W C"], ids_shuffle: Int[Array, "B L"]) -> UInt[Array, "B"]:
    """Returns a checksum of each example together with its mask."""
    return jax.vmap(lambda image, ids: checksum(image) ^ checksum(ids + 1))(images, ids_shuffle)


def make_pictures(
    config: ConfigDict, pred: Float[Array, "B L P"], true: Float[Array, "B L P"], mask: Float[Array, "B L"]
) -> dict[str, Float[Array, "B H W C"]]:
    """Turns a prediction into pictures.

    Args:
      config: the pretraining's; `pictures.pix_stats` chooses the moments by which patches are de-normalised.
      pred: predictions, normalised per patch with `norm_pix_loss`.
      true: the patches as the model saw them.
      mask: 1 where a patch was removed.

    Returns:
      `original`, `masked`, `reconstruction`, `with_visible`: float32 in 0..1, of `data.dtype` float32 as
      they are.
    """
    model = config.model
    pixels = pred
    if config.pretrain.norm_pix_loss:  # the model does not predict the moments of patches
        if config.pictures.pix_stats == "visible":
            grid = patches.grid_size(model.image_size, model.patch_size)
            patch_mean, patch_std = losses.visible_moments(true, mask, grid)
        else:
            patch_mean, patch_std = losses.patch_moments(true)
        pixels = pred * patch_std + patch_mean
    removed = mask[:, :, None]  # (B, L, 1)

    def picture(x: jax.Array) -> jax.Array:
        pixels = unscale_pixels(patches.unpatchify(x, model.image_size, model.patch_size), config.data)
        return pixels if config.data.dtype == "float32" else jnp.clip(pixels, 0, 1)

    half = jnp.full((1, *model.image_size, model.channels), 0.5, jnp.float32)
    blank = patches.patchify(scale_pixels(half, config.data), model.patch_size)  # gray
    return {
        "original": picture(true),
        "masked": picture(jnp.where(removed > 0, blank, true)),
        "reconstruction": picture(pixels),
        "with_visible": picture(jnp.where(removed > 0, pixels, true)),
    }
