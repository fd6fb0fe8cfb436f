"""The encoder: a vision transformer over all patches of an image, or over the kept ones only.

Shapes: B batch, H W C image, L patches, K kept patches, P values of one patch, N tokens (class tokens, then K or L), D
encoder width.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from mae_dist.model import patches
from mae_dist.model.functional import dropout, fold_in, layer_norm, linear
from mae_dist.model.hooks import PLAIN, Hooks
from mae_dist.model.layers import Stack, token, token_value, xavier
from mae_dist.model.positions import Positions


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
        num_cls: int,
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
        self.num_cls = num_cls
        self.cls_token = token(cls_token, embed_dim, rngs, num_cls) if num_cls else None
        self.stack = Stack(embed_dim, depth=depth, norm_eps=norm_eps, dtype=dtype, hooks=hooks, rngs=rngs, **stack)
        self.norm = nnx.LayerNorm(embed_dim, epsilon=norm_eps, rngs=rngs) if final_norm else None
        self.dtype, self.dropout, self.hooks = dtype, stack["dropout"], hooks

    def __call__(
        self,
        x: Float[Array, "B L P"],
        ids_keep: Int[Array, "B K"] | None,
        keys: Key[Array, "B"] | None,
        num_blocks: int | None = None,
        *,
        every_block: bool = False,
    ) -> Float[Array, "*S B N D"]:
        """Encodes patches.

        Args:
          x: all patches of the images.
          ids_keep: the patches to encode, None for all; the others never enter the computation.
          keys: for dropout and DropPath; None for neither.
          num_blocks: stop after `num_blocks` blocks, before the final norm; None for all blocks and the norm.
          every_block: return the embedded patches and the tokens after each block, the last ones after the final norm.

        Returns:
          Tokens (B, N, D), class tokens first; with `every_block` (depth + 1, B, N, D).
        """
        position = self.positions(self.dtype)  # (1, L, D)
        if ids_keep is not None:
            # Gather before embedding: K rows of the matmul instead of L.
            x = patches.take_patches(x, ids_keep)  # (B, K, P)
            position = position[0][ids_keep]  # (B, K, D)
        x = linear(self.patch_embed, x, affine=self.hooks.affine) + position  # (B, K, D)
        if self.num_cls:
            cls = token_value(self.cls_token, x.shape[0], self.num_cls, x.shape[2], self.dtype)
            x = jnp.concatenate([cls, x], axis=1)  # (B, num_cls + K, D)
        x = dropout(x, self.dropout, fold_in(keys, self.stack.depth))
        if every_block:
            assert self.norm is not None
            assert num_blocks is None
            outputs = self.stack(x, keys, every_block=True)
            return jnp.concatenate([x[None], outputs[:-1], layer_norm(self.norm, outputs[-1:])])
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
          pools: any of `cls` (the mean of the class tokens), `gap` (that of the patches), `patches` (one for each).
          keys, num_blocks: as `__call__`.

        Returns:
          For each pool (B, D), for `patches` (B, gh, gw, D).
        """
        tokens = self(patches.patchify(images, self.patch_size), None, keys, num_blocks)  # (B, N, D)

        def pool(kind: str) -> jax.Array:
            if kind == "cls":
                return tokens[:, : self.num_cls].mean(axis=1) if self.num_cls > 1 else tokens[:, 0]
            rest = tokens[:, self.num_cls :]
            return rest.mean(axis=1) if kind == "gap" else rest.reshape(-1, *self.positions.grid, rest.shape[-1])

        return {kind: pool(kind) for kind in pools}
