"""The masked autoencoder (He et al. 2021) and the classifiers that stand on its encoder.

Shapes: B batch, H W C image, L patches, K kept patches, P values of one patch, N tokens (K or L, plus one with a class
token), D encoder width, E decoder width, Y classes.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mae_dist.model import masking as model_masking
from mae_dist.model import patches
from mae_dist.model.functional import dropout, fold_in, layer_norm, linear
from mae_dist.model.hooks import PLAIN, Hooks
from mae_dist.model.layers import Stack, normal02, xavier
from mae_dist.model.positions import Positions


def _token(kind: str, dim: int, rngs: nnx.Rngs) -> nnx.Param | None:
    """A learned token (1, 1, dim) ~ N(0, 0.02), or None where it is the constant zero."""
    return nnx.Param(normal02(rngs.params(), (1, 1, dim), jnp.float32)) if kind == "learned" else None


def _token_value(token: nnx.Param | None, batch: int, count: int, dim: int, dtype: Any) -> jax.Array:
    """Repeats a token to (batch, count, dim)."""
    value = jnp.zeros((1, 1, dim), dtype) if token is None else token[...].astype(dtype)
    return jnp.broadcast_to(value, (batch, count, dim))


class Encoder(nnx.Module):
    """Vision transformer over the patches it is given: all of them, or the kept ones only."""

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
        dtype: Any,
        hooks: Hooks,
        rngs: nnx.Rngs,
        final_norm: bool = True,
        **stack: Any,
    ):
        self.patch_size = patch_size
        self.patch_embed = nnx.Linear(patch_dim, embed_dim, dtype=dtype, kernel_init=xavier, rngs=rngs)
        self.positions = Positions(pos_embed, grid, embed_dim, rngs=rngs)
        self.has_cls = cls_token != "none"
        self.cls_token = _token(cls_token, embed_dim, rngs)
        self.stack = Stack(embed_dim, depth=depth, norm_eps=norm_eps, dtype=dtype, hooks=hooks, rngs=rngs, **stack)
        self.final_norm = final_norm
        if final_norm:
            self.norm = nnx.LayerNorm(embed_dim, epsilon=norm_eps, rngs=rngs)
        self.dtype, self.dropout, self.hooks = dtype, stack["dropout"], hooks

    def __call__(
        self, x: jax.Array, ids_keep: jax.Array | None, keys: jax.Array | None, num_blocks: int | None = None
    ) -> jax.Array:
        """Encodes patches.

        Args:
          x: all patches of the images, (B, L, P).
          ids_keep: (B, K) which patches to look at, or None for all; the others never enter the computation.
          keys: one key per example for dropout and DropPath, or None.
          num_blocks: stop after so many blocks, before the final norm; None for all of them and the norm.

        Returns:
          Tokens (B, N, D), the class token first if there is one.
        """
        position = self.positions(self.dtype)  # (1, L, D)
        if ids_keep is not None:
            # Gathering raw patches before embedding them: K products instead of L.
            x = patches.take_patches(x, ids_keep)  # (B, K, P)
            position = position[0][ids_keep]  # (B, K, D)
        x = linear(self.patch_embed, x, affine=self.hooks.affine) + position  # (B, K, D)
        if self.has_cls:
            cls = _token_value(self.cls_token, x.shape[0], 1, x.shape[2], self.dtype)
            x = jnp.concatenate([cls, x], axis=1)  # (B, 1 + K, D)
        x = dropout(x, self.dropout, fold_in(keys, self.stack.depth))
        x = self.stack(x, keys, num_blocks)
        return layer_norm(self.norm, x) if self.final_norm and num_blocks is None else x

    def features(
        self, images: jax.Array, pools: Sequence[str], keys: jax.Array | None = None, num_blocks: int | None = None
    ) -> dict[str, jax.Array]:
        """Encodes whole images.

        Args:
          images: scaled pixels, (B, H, W, C).
          pools: the class token (`cls`), the mean over patches (`gap`), or a vector for each patch (`patches`).
          keys, num_blocks: as `__call__`.

        Returns:
          By pool (B, D), or for `patches` (B, gh, gw, D).
        """
        tokens = self(patches.patchify(images, self.patch_size), None, keys, num_blocks)  # (B, N, D)

        def pool(kind: str) -> jax.Array:
            if kind == "cls":
                return tokens[:, 0]
            rest = tokens[:, int(self.has_cls) :]
            return rest.mean(axis=1) if kind == "gap" else rest.reshape(-1, *self.positions.grid, rest.shape[-1])

        return {kind: pool(kind) for kind in pools}


class Decoder(nnx.Module):
    """Transformer that sees the encoded patches and mask tokens in their places and predicts every patch."""

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
        dtype: Any,
        hooks: Hooks,
        rngs: nnx.Rngs,
        **stack: Any,
    ):
        self.embed = nnx.Linear(in_dim, embed_dim, dtype=dtype, kernel_init=xavier, rngs=rngs)
        self.mask_token = _token(mask_token, embed_dim, rngs)
        self.positions = Positions(pos_embed, grid, embed_dim, rngs=rngs)
        self.stack = Stack(embed_dim, depth=depth, norm_eps=norm_eps, dtype=dtype, hooks=hooks, rngs=rngs, **stack)
        self.norm = nnx.LayerNorm(embed_dim, epsilon=norm_eps, rngs=rngs)
        self.pred = nnx.Linear(embed_dim, patch_dim, dtype=dtype, kernel_init=xavier, rngs=rngs)
        self.has_cls, self.dtype, self.hooks = has_cls, dtype, hooks

    def __call__(self, latent: jax.Array, ids_restore: jax.Array, keys: jax.Array | None) -> jax.Array:
        """latent (B, N, D), ids_restore (B, L) -> float32 predictions (B, L, P)."""
        x = linear(self.embed, latent, affine=self.hooks.affine)  # (B, N, E)
        cls, x = x[:, : int(self.has_cls)], x[:, int(self.has_cls) :]
        b, kept, dim = x.shape
        removed = _token_value(self.mask_token, b, ids_restore.shape[1] - kept, dim, self.dtype)
        x = patches.take_patches(jnp.concatenate([x, removed], axis=1), ids_restore)  # (B, L, E) in raster order
        x = jnp.concatenate([cls, x + self.positions(self.dtype)], axis=1)
        return self._predict(self.stack(x, keys)[:, int(self.has_cls) :])

    def predict_removed(self, latent: jax.Array, ids_shuffle: jax.Array, keys: jax.Array | None) -> jax.Array:
        """The same predictions, of the removed patches only and in their shuffled order: float32 (B, L - K, P).

        For training, where nothing else is looked at: attention does not mind the order, so nothing is put back into
        raster order, and the last block spares what only visible patches would need.
        """
        x = linear(self.embed, latent, affine=self.hooks.affine)  # (B, N, E)
        cls, x = x[:, : int(self.has_cls)], x[:, int(self.has_cls) :]
        b, kept, dim = x.shape
        num_removed = ids_shuffle.shape[1] - kept
        removed = _token_value(self.mask_token, b, num_removed, dim, self.dtype)
        x = jnp.concatenate([x, removed], axis=1) + self.positions(self.dtype)[0][ids_shuffle]  # (B, L, E)
        x = self.stack(jnp.concatenate([cls, x], axis=1), keys, num_out=num_removed)
        return self._predict(x)

    def _predict(self, x: jax.Array) -> jax.Array:
        """Tokens (B, N, E) -> float32 values of their patches (B, N, P)."""
        x = layer_norm(self.norm, x)
        return linear(self.pred, x, affine=self.hooks.affine).astype(jnp.float32)


class MaskedAutoencoder(nnx.Module):
    """Encoder on kept patches, decoder on all; its keyword arguments are the fields of `config.model`."""

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
        pos_embed: str,
        layer_scale_init: float,
        norm_eps: float,
        drop_path: float,
        dropout: float,
        qkv_bias: bool,
        gelu: str,
        dtype: str,
        scan: bool,
        remat: str,
        final_norm: bool = True,  # of the encoder; a classifier may normalise what it pooled instead
        hooks: Hooks = PLAIN,
        rngs: nnx.Rngs,
    ):
        self.image_size, self.patch_size, self.channels = image_size, patch_size, channels
        self.grid = patches.grid_size(image_size, patch_size)
        self.mask_ratio, self.masking, self.mask_file = mask_ratio, masking, mask_file
        patch_dim = patch_size[0] * patch_size[1] * channels
        shared: dict[str, Any] = {
            "grid": self.grid,
            "patch_dim": patch_dim,
            "pos_embed": pos_embed,
            "dtype": jnp.dtype(dtype),
            "layer_scale_init": layer_scale_init,
            "norm_eps": norm_eps,
            "dropout": dropout,
            "qkv_bias": qkv_bias,
            "gelu": gelu,
            "scan": scan,
            "remat": remat,
            "hooks": hooks,
            "rngs": rngs,
        }
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

    def draw_ids_shuffle(self, keys: jax.Array) -> tuple[jax.Array, int]:
        """One mask per example by the configured strategy: keys (B,) -> ids_shuffle (B, L) and K."""
        return model_masking.draw_ids_shuffle(
            keys, strategy=self.masking, grid=self.grid, mask_ratio=self.mask_ratio, mask_file=self.mask_file
        )

    def __call__(
        self, images: jax.Array, ids_shuffle: jax.Array, kept: int, keys: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Reconstructs images from their kept patches.

        Args:
          images: scaled pixels (B, H, W, C), float32.
          ids_shuffle: (B, L), the kept patches first.
          kept: K.
          keys: one key per example for dropout and DropPath, or None.

        Returns:
          Predictions (B, L, P) float32, the true patches (B, L, P) float32, and the mask (B, L).
        """
        x = patches.patchify(images, self.patch_size)  # (B, L, P)
        ids_restore = model_masking.restore_ids(ids_shuffle)
        latent = self.encoder(x, ids_shuffle[:, :kept], keys)  # (B, N, D)
        pred = self.decoder(latent, ids_restore, fold_in(keys, 1 << 16))  # apart from the encoder's layer indices
        return pred, x, model_masking.mask_from_ids(ids_restore, kept)

    def removed_patches(
        self, images: jax.Array, ids_shuffle: jax.Array, kept: int, keys: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """What a training loss needs of `__call__`, for less: its arguments, removed patches only.

        Returns:
          Predictions and true patches, both (B, L - K, P) float32, in shuffled order.
        """
        x = patches.patchify(images, self.patch_size)  # (B, L, P)
        latent = self.encoder(x, ids_shuffle[:, :kept], keys)  # (B, N, D)
        pred = self.decoder.predict_removed(latent, ids_shuffle, fold_in(keys, 1 << 16))
        return pred, patches.take_patches(x, ids_shuffle[:, kept:])
