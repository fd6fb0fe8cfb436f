"""The masked autoencoder (He et al. 2021).

Shapes: B batch, H W C image, L patches, K kept patches, P values of one patch, N tokens (K or L, plus one with a class
token), D encoder width, E decoder width.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from mae_dist.model import masking as model_masking
from mae_dist.model import patches
from mae_dist.model.functional import dropout, fold_in, layer_norm, linear
from mae_dist.model.hooks import PLAIN, Hooks
from mae_dist.model.layers import Stack, normal02, xavier
from mae_dist.model.positions import Positions


def _token(kind: str, dim: int, rngs: nnx.Rngs) -> nnx.Param[jax.Array] | None:
    """Returns a learned token (1, 1, dim) ~ N(0, 0.02), or None for a constant zero."""
    return nnx.Param(normal02(rngs.params(), (1, 1, dim), jnp.float32)) if kind == "learned" else None


def _token_value(
    token: nnx.Param[jax.Array] | None, batch: Any, count: int, dim: int, dtype: Any
) -> Float[Array, "B count dim"]:
    """Repeats a token `count` times for each of `batch` examples, an int or, in an export, a symbolic dimension."""
    value = jnp.zeros((1, 1, dim), dtype) if token is None else token[...].astype(dtype)
    return jnp.broadcast_to(value, (batch, count, dim))


class Encoder(nnx.Module):
    """Vision transformer over all patches of an image, or over the kept ones only."""

    def __init__(
        self,
        *,
        grid: tuple[int, int],
        patch_size: tuple[int, int],
        patch_dim: int,
        embed_dim: int,
        depth: int,
        cls_token: str,
        pos_embed: str,
        norm_eps: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        hooks: Hooks = PLAIN,
        final_norm: bool = True,
        **stack: Any,
    ):
        self.patch_size = patch_size
        self.patch_embed = nnx.Linear(patch_dim, embed_dim, dtype=dtype, kernel_init=xavier, rngs=rngs)
        self.positions = Positions(pos_embed, grid, embed_dim, rngs=rngs)
        self.has_cls = cls_token != "none"
        self.cls_token = _token(cls_token, embed_dim, rngs)
        self.stack = Stack(embed_dim, depth=depth, norm_eps=norm_eps, dtype=dtype, hooks=hooks, rngs=rngs, **stack)
        self.norm = nnx.LayerNorm(embed_dim, epsilon=norm_eps, rngs=rngs) if final_norm else None
        self.dtype, self.dropout, self.hooks = dtype, stack["dropout"], hooks

    def __call__(
        self,
        x: Float[Array, "B L P"],
        ids_keep: Int[Array, "B K"] | None,
        keys: Key[Array, "B"] | None,
        num_blocks: int | None = None,
    ) -> Float[Array, "B N D"]:
        """Encodes patches.

        Args:
          x: all patches of the images.
          ids_keep: the patches to encode, None for all; the others never enter the computation.
          keys: for dropout and DropPath; None for neither.
          num_blocks: stop after `num_blocks` blocks, before the final norm; None for all blocks and the norm.

        Returns:
          Tokens, the class token first if there is one.
        """
        position = self.positions(self.dtype)  # (1, L, D)
        if ids_keep is not None:
            # Gather before embedding: K rows of the matmul instead of L.
            x = patches.take_patches(x, ids_keep)  # (B, K, P)
            position = position[0][ids_keep]  # (B, K, D)
        x = linear(self.patch_embed, x, affine=self.hooks.affine) + position  # (B, K, D)
        if self.has_cls:
            cls = _token_value(self.cls_token, x.shape[0], 1, x.shape[2], self.dtype)
            x = jnp.concatenate([cls, x], axis=1)  # (B, 1 + K, D)
        x = dropout(x, self.dropout, fold_in(keys, self.stack.depth))
        x = self.stack(x, keys, num_blocks)
        return x if self.norm is None or num_blocks is not None else layer_norm(self.norm, x)

    def features(
        self,
        images: Float[Array, "B H W C"],
        pools: Sequence[str],
        keys: Key[Array, "B"] | None = None,
        num_blocks: int | None = None,
    ) -> dict[str, Float[Array, "B *D"]]:
        """Encodes whole images.

        Args:
          images: scaled pixels.
          pools: any of `cls` (the class token), `gap` (the mean over patches), `patches` (one vector per patch).
          keys, num_blocks: as `__call__`.

        Returns:
          For each pool (B, D), for `patches` (B, gh, gw, D).
        """
        tokens = self(patches.patchify(images, self.patch_size), None, keys, num_blocks)  # (B, N, D)

        def pool(kind: str) -> jax.Array:
            if kind == "cls":
                return tokens[:, 0]
            rest = tokens[:, int(self.has_cls) :]
            return rest.mean(axis=1) if kind == "gap" else rest.reshape(-1, *self.positions.grid, rest.shape[-1])

        return {kind: pool(kind) for kind in pools}


class Decoder(nnx.Module):
    """Transformer over encoded patches, with mask tokens in the places of removed ones; predicts patches."""

    def __init__(
        self,
        *,
        grid: tuple[int, int],
        patch_dim: int,
        in_dim: int,
        embed_dim: int,
        depth: int,
        has_cls: bool,
        mask_token: str,
        pos_embed: str,
        norm_eps: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        hooks: Hooks = PLAIN,
        **stack: Any,
    ):
        self.embed = nnx.Linear(in_dim, embed_dim, dtype=dtype, kernel_init=xavier, rngs=rngs)
        self.mask_token = _token(mask_token, embed_dim, rngs)
        self.positions = Positions(pos_embed, grid, embed_dim, rngs=rngs)
        self.stack = Stack(embed_dim, depth=depth, norm_eps=norm_eps, dtype=dtype, hooks=hooks, rngs=rngs, **stack)
        self.norm = nnx.LayerNorm(embed_dim, epsilon=norm_eps, rngs=rngs)
        self.pred = nnx.Linear(embed_dim, patch_dim, dtype=dtype, kernel_init=xavier, rngs=rngs)
        self.has_cls, self.dtype, self.hooks = has_cls, dtype, hooks

    def __call__(
        self, latent: Float[Array, "B N D"], ids_restore: Int[Array, "B L"], keys: Key[Array, "B"] | None
    ) -> Float[Array, "B L P"]:
        """Predicts every patch, in raster order, float32."""
        cls, x = self._embed(latent, ids_restore.shape[1])
        x = patches.take_patches(x, ids_restore) + self.positions(self.dtype)  # (B, L, E) in raster order
        x = self.stack(jnp.concatenate([cls, x], axis=1), keys)
        return self._predict(x[:, int(self.has_cls) :])

    def predict_removed(
        self, latent: Float[Array, "B N D"], ids_shuffle: Int[Array, "B L"], keys: Key[Array, "B"] | None
    ) -> Float[Array, "B removed P"]:
        """Predicts the removed patches only, in shuffled order, float32.

        A training loss needs no others. Attention does not depend on the order of tokens, so nothing is put back into
        raster order, and the last block computes no visible tokens.
        """
        num_patches = ids_shuffle.shape[1]
        cls, x = self._embed(latent, num_patches)
        x = x + self.positions(self.dtype)[0][ids_shuffle]  # (B, L, E)
        num_removed = num_patches + int(self.has_cls) - latent.shape[1]
        return self._predict(self.stack(jnp.concatenate([cls, x], axis=1), keys, num_out=num_removed))

    def _embed(
        self, latent: Float[Array, "B N D"], num_patches: int
    ) -> tuple[Float[Array, "B cls E"], Float[Array, "B L E"]]:
        """Returns the class token, and L tokens of patches: the kept ones, then mask tokens."""
        x = linear(self.embed, latent, affine=self.hooks.affine)  # (B, N, E)
        cls, x = x[:, : int(self.has_cls)], x[:, int(self.has_cls) :]
        b, kept, dim = x.shape
        removed = _token_value(self.mask_token, b, num_patches - kept, dim, self.dtype)
        return cls, jnp.concatenate([x, removed], axis=1)

    def _predict(self, x: Float[Array, "B N E"]) -> Float[Array, "B N P"]:
        """Returns the values of the tokens' patches, float32."""
        x = layer_norm(self.norm, x)
        return linear(self.pred, x, affine=self.hooks.affine).astype(jnp.float32)


class MaskedAutoencoder(nnx.Module):
    """Encoder on kept patches, decoder on all; the keyword arguments are the fields of `config.model`.

    Those that encoder and decoder take alike are `shared`, with the hooks and the initial random numbers.
    """

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        channels: int,
        patch_size: tuple[int, int],
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        decoder_embed_dim: int,
        decoder_depth: int,
        decoder_num_heads: int,
        decoder_mlp_ratio: float,
        mask_ratio: float,
        masking: str,
        mask_file: str,
        cls_token: str,
        mask_token: str,
        drop_path: float,
        dtype: str,
        final_norm: bool = True,  # False where a classifier normalises after pooling instead
        **shared: Any,
    ):
        self.image_size, self.patch_size, self.channels = image_size, patch_size, channels
        self.grid = patches.grid_size(image_size, patch_size)
        self.mask_ratio, self.masking, self.mask_file = mask_ratio, masking, mask_file
        shared["grid"], shared["dtype"] = self.grid, jnp.dtype(dtype)
        shared["patch_dim"] = patch_size[0] * patch_size[1] * channels
        self.encoder = Encoder(
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            cls_token=cls_token,
            drop_path=drop_path,
            final_norm=final_norm,
            **shared,
        )
        self.decoder = Decoder(
            in_dim=embed_dim,
            embed_dim=decoder_embed_dim,
            depth=decoder_depth,
            num_heads=decoder_num_heads,
            mlp_ratio=decoder_mlp_ratio,
            mask_token=mask_token,
            has_cls=cls_token != "none",
            drop_path=0.0,
            **shared,
        )

    def draw_ids_shuffle(self, keys: Key[Array, "B"]) -> tuple[Int[Array, "B L"], int]:
        """Draws one mask per example with the configured strategy; returns ids_shuffle and K."""
        return model_masking.draw_ids_shuffle(
            keys, strategy=self.masking, grid=self.grid, mask_ratio=self.mask_ratio, mask_file=self.mask_file
        )

    def __call__(
        self,
        images: Float[Array, "B H W C"],
        ids_shuffle: Int[Array, "B L"],
        kept: int,
        keys: Key[Array, "B"] | None,
    ) -> tuple[Float[Array, "B L P"], Float[Array, "B L P"], Float[Array, "B L"]]:
        """Reconstructs images from their kept patches.

        Args:
          images: scaled pixels, float32.
          ids_shuffle: the kept patches first.
          kept: K.
          keys: for dropout and DropPath; None for neither.

        Returns:
          The predicted and the true patches, float32, and the mask.
        """
        x = patches.patchify(images, self.patch_size)  # (B, L, P)
        ids_restore = model_masking.restore_ids(ids_shuffle)
        latent = self.encoder(x, ids_shuffle[:, :kept], keys)  # (B, N, D)
        pred = self.decoder(latent, ids_restore, fold_in(keys, 1 << 16))  # beyond the encoder's layer indices
        return pred, x, model_masking.mask_from_ids(ids_restore, kept)

    def removed_patches(
        self,
        images: Float[Array, "B H W C"],
        ids_shuffle: Int[Array, "B L"],
        kept: int,
        keys: Key[Array, "B"] | None,
    ) -> tuple[Float[Array, "B removed P"], Float[Array, "B removed P"]]:
        """Reconstructs the removed patches only, all that a training loss needs; arguments as of `__call__`.

        Returns:
          The predicted and the true patches, float32, in shuffled order.
        """
        x = patches.patchify(images, self.patch_size)  # (B, L, P)
        latent = self.encoder(x, ids_shuffle[:, :kept], keys)  # (B, N, D)
        pred = self.decoder.predict_removed(latent, ids_shuffle, fold_in(keys, 1 << 16))
        return pred, patches.take_patches(x, ids_shuffle[:, kept:])
