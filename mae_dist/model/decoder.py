"""The decoder of He et al. 2021: self-attention over encoded patches and mask tokens.

Shapes: B batch, H W C image, L patches, K kept patches, P values of one patch, N tokens (class tokens, then K or L), D
encoder width, E decoder width.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from mae_dist.model import patches
from mae_dist.model.functional import layer_norm, linear
from mae_dist.model.hooks import PLAIN, Hooks
from mae_dist.model.layers import Stack, token, token_value, xavier
from mae_dist.model.positions import Positions


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
        num_cls: int,
        mask_token: str,
        pos_embed: str,
        norm_eps: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        hooks: Hooks = PLAIN,
        **stack: Any,
    ):
        self.embed = nnx.Linear(in_dim, embed_dim, dtype=dtype, kernel_init=xavier, rngs=rngs)
        self.mask_token = token(mask_token, embed_dim, rngs)
        self.positions = Positions(pos_embed, grid, embed_dim, rngs=rngs)
        self.stack = Stack(embed_dim, depth=depth, norm_eps=norm_eps, dtype=dtype, hooks=hooks, rngs=rngs, **stack)
        self.norm = nnx.LayerNorm(embed_dim, epsilon=norm_eps, rngs=rngs)
        self.pred = nnx.Linear(embed_dim, patch_dim, dtype=dtype, kernel_init=xavier, rngs=rngs)
        self.num_cls, self.dtype, self.hooks = num_cls, dtype, hooks

    def __call__(
        self, latent: Float[Array, "B N D"], ids_restore: Int[Array, "B L"], keys: Key[Array, "B"] | None
    ) -> Float[Array, "B L P"]:
        """Predicts every patch, in raster order, float32."""
        cls, x = self._embed(latent, ids_restore.shape[1])
        x = patches.take_patches(x, ids_restore) + self.positions(self.dtype)  # (B, L, E) in raster order
        x = self.stack(jnp.concatenate([cls, x], axis=1), keys)
        return self._predict(x[:, self.num_cls :])

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
        num_removed = num_patches + self.num_cls - latent.shape[1]
        return self._predict(self.stack(jnp.concatenate([cls, x], axis=1), keys, num_out=num_removed))

    def _embed(
        self, latent: Float[Array, "B N D"], num_patches: int
    ) -> tuple[Float[Array, "B cls E"], Float[Array, "B L E"]]:
        """Returns the class tokens, and L tokens of patches: the kept ones, then mask tokens."""
        x = linear(self.embed, latent, affine=self.hooks.affine)  # (B, N, E)
        cls, x = x[:, : self.num_cls], x[:, self.num_cls :]
        b, kept, dim = x.shape
        removed = token_value(self.mask_token, b, num_patches - kept, dim, self.dtype)
        return cls, jnp.concatenate([x, removed], axis=1)

    def _predict(self, x: Float[Array, "B N E"]) -> Float[Array, "B N P"]:
        """Returns the values of the tokens' patches, float32."""
        x = layer_norm(self.norm, x)
        return linear(self.pred, x, affine=self.hooks.affine).astype(jnp.float32)
