"""A trained encoder as a function of images: `mae_dist.load_encoder(path).features(images)`.

Shapes: B images, H W C image, (gh, gw) grid of patches, N tokens, D width.
"""

import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_dist import steps
from mae_dist.errors import ConfigError, DataFault
from mae_dist.model import autoencoder, patches
from mae_dist.model.build import functional
from mae_dist.model.flops import forward_flops
from mae_dist.model.layers import Constrain, unconstrained
from mae_dist.parallel.mesh import make_mesh
from mae_dist.parallel.shardings import make_constrain, replicated
from mae_dist.storage import absolute
from mae_dist.tasks.base import scale_pixels
from mae_dist.weights import pretrained

KINDS = ("mean", "cls", "patches")
Encode = Callable[[Any, jax.Array], dict[str, jax.Array]]


def make_encode(
    config: ConfigDict, kinds: Sequence[str], block: int | None = None, constrain: Constrain = unconstrained
) -> Encode:
    """A pure function of (parameters, images) that sees all patches and has nothing random.

    Args:
      config: of the model whose parameters it will be given; the group `encoder` is enough, but for a classifier that
        normalises what it pooled (`classify.norm_after_pool`), whose `mean` and `cls` need `head` too.
      kinds: which of `mean`, `cls` and `patches` to return.
      block: tokens as they leave this block, 1 the first, 0 before it, without a norm; None: the last, normalised.
      constrain: pins the layout of activations.

    Returns:
      The function. Its images are uint8 in 0..255 or floating-point in 0..1, (B, H, W, C). Its result has float32
      `mean` (B, D), the mean over patches; `cls` (B, D), the class token; `patches` (B, gh, gw, D).

    Raises:
      ConfigError: a kind or block that the model does not have.
    """
    model = config.model
    for kind in kinds:
        _check_kind(kind)
    if "cls" in kinds and model.cls_token == "none":
        raise ConfigError("'cls' features need a class token and the model has none; choose 'mean' or 'patches'")
    if block is not None and not 0 <= block <= model.depth:
        raise ConfigError(f"block {block}: the encoder has blocks 1 to {model.depth}, and 0 is what enters the first")
    grid = patches.grid_size(model.image_size, model.patch_size)
    norm_in_head = _norm_in_head(config)

    def make_encoder(rngs: nnx.Rngs) -> autoencoder.Encoder:
        return autoencoder.MaskedAutoencoder(
            **model.to_dict(), final_norm=not norm_in_head, constrain=constrain, rngs=rngs
        ).encoder

    bind = functional(make_encoder).bind
    bind_norm = functional(lambda rngs: nnx.LayerNorm(model.embed_dim, epsilon=model.norm_eps, rngs=rngs)).bind

    def encode(params: Mapping[str, Any], images: jax.Array) -> dict[str, jax.Array]:
        encoder = bind(params["encoder"])
        x = patches.patchify(scale(images, config), model.patch_size)
        tokens = encoder(x, None, None, block)  # (B, N, D)
        result = {}
        for kind in kinds:
            if kind == "patches":
                value = tokens[:, int(encoder.has_cls) :].reshape(-1, *grid, model.embed_dim)
            else:
                value = encoder.pool(tokens, "gap" if kind == "mean" else "cls")
                if norm_in_head and block is None:
                    value = bind_norm(params["head"]["norm"])(value.astype(jnp.float32))
            result[kind] = value.astype(jnp.float32)
        return result

    return encode


def make_feature_step(
    config: ConfigDict, mesh: Mesh, shardings: Any, batch_size: int, kinds: Sequence[str], block: int | None = None
) -> Any:
    """Compiles (params, batch) -> features, split over examples like the batch; otherwise as `make_encode`.

    `shardings` are those of the parameters it is given, `batch_size` the images of all devices together.
    """
    encode = make_encode(config, kinds, block, make_constrain(mesh))
    return steps.make_eval_step(
        lambda params, batch: encode(params, batch["image"]),
        mesh=mesh,
        params=shardings,
        per_example=True,
        pieces=steps.num_pieces(config, mesh, batch_size),
        products=steps.choose_products(config, mesh, forward_flops(config)),
    )


def _check_kind(kind: Any) -> None:
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"there are no {kind!r} features; choose of {', '.join(KINDS)}")


def _whole(name: str, value: Any) -> int:
    """A whole number of any integer type; a `ConfigError` for anything else, 1.0 included."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise ConfigError(f"{name}={value!r} is no whole number; give an int") from error


def _norm_in_head(config: ConfigDict) -> bool:
    return config.task == "finetune" and config.classify.norm_after_pool


def scale(images: jax.Array, config: ConfigDict) -> jax.Array:
    """uint8 in 0..255 or floating-point in 0..1 (B, H, W, C) -> float32 as the model sees them."""
    if jnp.issubdtype(images.dtype, jnp.floating):
        images = images.astype(jnp.float32) * 255
    return scale_pixels(images, config.data.mean, config.data.std)


def needed_shapes(source: pretrained.Pretrained) -> pretrained.Params:
    """The shapes of the parameters that `make_encode`'s function reads, by group."""
    if not _norm_in_head(source.config):
        return {"encoder": source.abstract["encoder"]}
    if "head" not in source.abstract:
        raise ConfigError(
            f"{source.origin} was fine-tuned with classify.norm_after_pool, so that its features need the norm in its "
            "head, and it has no head; convert it without --encoder_only"
        )
    return {group: source.abstract[group] for group in ("encoder", "head")}


class Encoder:
    """A trained encoder on this process's first device.

    Attributes:
      image_size: (height, width) of the images it takes.
      channels: C.
      grid: (gh, gw) patches down and across.
      embed_dim: D.
      depth: number of blocks.
      config: everything known of how it was trained.
    """

    def __init__(self, source: pretrained.Pretrained):
        self.config = source.config
        model = self.config.model
        self.image_size, self.channels = tuple(model.image_size), model.channels
        self.grid = patches.grid_size(model.image_size, model.patch_size)
        self.embed_dim, self.depth = model.embed_dim, model.depth
        self._origin = source.origin
        self._params = source.load_here(needed_shapes(source))
        self._mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.local_devices()[:1])
        self._steps: dict[tuple[str, int | None, int], Any] = {}

    def __repr__(self) -> str:
        height, width = self.image_size
        return f"Encoder({self._origin}: {height}x{width}x{self.channels} -> {self.embed_dim}, {self.depth} blocks)"

    def features(
        self, images: Any, kind: str = "mean", *, block: int | None = None, batch_size: int = 256
    ) -> np.ndarray:
        """Deterministic features of whole images, nothing masked.

        Args:
          images: (B, H, W, C), any B: uint8 in 0..255, or floating-point in 0..1. H, W and C are `image_size` and
            `channels`; mean and standard deviation of the training are applied here.
          kind: `mean` over the patches, `cls` for the class token, `patches` for one vector per patch.
          block: of which block's output, from 1, before any norm; 0 is what enters the first; None is the output of the
            last one, normalised.
          batch_size: images computed at once.

        Returns:
          float32, (B, D) or for `patches` (B, gh, gw, D), on the host.

        Raises:
          ConfigError: a kind or block that the model does not have, or a batch size that is no whole number above 0.
          DataFault: images of another shape, type or range.
        """
        # Before they name a compiled step: 1.0 and 1 are the same key there.
        batch_size, block = _whole("batch_size", batch_size), block if block is None else _whole("block", block)
        if batch_size < 1:
            raise ConfigError(f"batch_size {batch_size}: at least one image has to be computed at once")
        _check_kind(kind)
        images = self._checked(np.asarray(images))
        # Few different sizes, for each is compiled: powers of two up to the batch's.
        size = min(batch_size, 1 << max(0, len(images) - 1).bit_length())
        step = self._steps.get((kind, block, size))
        if step is None:
            whole = replicated(self._mesh)
            step = make_feature_step(self.config, self._mesh, whole, size, (kind,), block)
            self._steps[kind, block, size] = step
        width = (*self.grid, self.embed_dim) if kind == "patches" else (self.embed_dim,)
        result = np.empty((len(images), *width), np.float32)
        for start in range(0, len(images), size):
            part = images[start : start + size]
            padded = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), part.dtype)])
            result[start : start + size] = np.asarray(step(self._params, {"image": padded})[kind])[: len(part)]
        return result

    def _checked(self, images: np.ndarray) -> np.ndarray:
        """The images, floating-point ones as float32; a `DataFault` for what the model cannot take."""
        expected = (*self.image_size, self.channels)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise DataFault(
                f"images have shape {images.shape}, needed: (B, {', '.join(map(str, expected))}); resize them first, "
                "or convert the encoder to their size"
            )
        if images.dtype == np.uint8:
            return images
        if not jnp.issubdtype(images.dtype, jnp.floating):  # bfloat16 is of JAX's, not of NumPy's types
            raise DataFault(f"images are {images.dtype}; needed: uint8 in 0..255 or floating-point in 0..1")
        # A little beyond is what resizing leaves; 0..255 in floats, or pixels normalised already, is not.
        if images.size and not (images.min() >= -0.1 and images.max() <= 1.1):
            raise DataFault(
                f"floating-point images reach from {images.min():g} to {images.max():g}; needed: 0..1, not normalised"
            )
        return images.astype(np.float32)


def load_encoder(path: str | os.PathLike[str], config: ConfigDict | None = None) -> Encoder:
    """Loads a trained encoder.

    Args:
      path: the workdir of a run (its newest checkpoint), a directory written by `mae_dist.convert`, one in Hugging
        Face's layout (ViTMAE or ViT), or a `.pth` or `.safetensors` file in timm's.
      config: for timm's layout, whose files do not say the number of heads nor the scaling of pixels: a config with
        both. Without, those of the published models are assumed, and that is said.

    Raises:
      DataFault, StorageFault, ConfigError: as `mae_dist.weights.pretrained.open_pretrained`.
    """
    from mae_dist.config import default

    return Encoder(pretrained.open_pretrained(absolute(path), default.get_config(), config))
