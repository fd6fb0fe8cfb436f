"""A cheaper decoder, CrossMAE (Fu et al. 2024, arXiv 2401.14391): removed patches are read from the encoder's tokens.

A query is the mask token plus a removed patch's position. Each block is cross-attention to the encoder's tokens, then
an MLP. Queries do not see each other, so any of them may be left out without a change of the others.

Shapes: B batch, L patches, K kept patches, Q queries, N tokens of the encoder (class tokens, then K), D encoder
width, E decoder width, H heads, hd = E / H, P values of one patch, S outputs of the encoder.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from mae_dist.model import functional
from mae_dist.model.functional import layer_norm, linear
from mae_dist.model.hooks import PLAIN, Hooks
from mae_dist.model.layers import Stack, token, token_value, unstack, xavier
from mae_dist.model.positions import Positions


class CrossAttention(nnx.Module):
    """Multi-head attention from queries to the encoder's tokens.

    With `num_inputs` above 1 keys and values are of a learned sum of so many outputs of the encoder, normalised
    ("inter-block attention" in the paper, which draws the weights from N(0, 1 / S)).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        in_dim: int,
        num_inputs: int,
        norm_eps: float,
        qkv_bias: bool,
        dtype: Any,
        rngs: nnx.Rngs,
        hooks: Hooks = PLAIN,
    ):
        head_dim = dim // num_heads
        make = functools.partial(nnx.LinearGeneral, dtype=dtype, kernel_init=xavier, rngs=rngs)
        self.q = make(dim, (num_heads, head_dim), use_bias=qkv_bias)
        self.kv = make(in_dim, (2, num_heads, head_dim), use_bias=qkv_bias)
        self.out = make((num_heads, head_dim), dim, axis=(-2, -1))
        self.fuses = num_inputs > 1
        if self.fuses:
            weights = jax.random.normal(rngs.params(), (num_inputs,), jnp.float32) * num_inputs**-0.5
            self.block_weights = nnx.Param(weights)
            self.norm_kv = nnx.LayerNorm(in_dim, epsilon=norm_eps, rngs=rngs)
        self.hooks = hooks

    def __call__(self, x: Float[Array, "B Q E"], memory: Float[Array, "*S B N D"]) -> Float[Array, "B Q E"]:
        """Returns the queries' attention to `memory`: the encoder's tokens, or with a sum all of its outputs."""
        linear = functools.partial(functional.linear, affine=self.hooks.affine)
        if self.fuses:
            weights = self.block_weights[...].astype(memory.dtype)
            memory = layer_norm(self.norm_kv, jnp.einsum("s,sbnd->bnd", weights, memory))  # (B, N, D)
        q = linear(self.q, x)  # (B, Q, H, hd)
        k, v = unstack(linear(self.kv, memory))  # 2 (B, N, H, hd)
        return linear(self.out, self.hooks.attention(q, k, v))


class CrossDecoder(nnx.Module):
    """Blocks of cross-attention and MLP; predicts patches. Takes the place of `decoder.Decoder`."""

    def __init__(
        self,
        *,
        grid: tuple[int, int],
        patch_dim: int,
        in_dim: int,
        num_inputs: int,
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
        self.mask_token = token(mask_token, embed_dim, rngs)
        self.positions = Positions(pos_embed, grid, embed_dim, rngs=rngs)
        attention = functools.partial(CrossAttention, in_dim=in_dim, num_inputs=num_inputs, norm_eps=norm_eps)
        self.stack = Stack(
            embed_dim,
            depth=depth,
            norm_eps=norm_eps,
            dtype=dtype,
            hooks=hooks,
            rngs=rngs,
            attention=attention,
            **stack,
        )
        self.norm = nnx.LayerNorm(embed_dim, epsilon=norm_eps, rngs=rngs)
        self.pred = nnx.Linear(embed_dim, patch_dim, dtype=dtype, kernel_init=xavier, rngs=rngs)
        self.embed_dim, self.num_cls, self.dtype, self.hooks = embed_dim, num_cls, dtype, hooks

    def __call__(
        self, latent: Float[Array, "*S B N D"], ids_restore: Int[Array, "B L"], keys: Key[Array, "B"] | None
    ) -> Float[Array, "B L P"]:
        """Predicts every patch, in raster order, float32; kept ones too, as if they were removed."""
        batch, length = ids_restore.shape
        positions = self.positions(self.dtype)  # (1, L, E)
        return self._predict(latent, jnp.broadcast_to(positions, (batch, length, self.embed_dim)), keys)

    def predict_removed(
        self, latent: Float[Array, "*S B N D"], ids_shuffle: Int[Array, "B _"], keys: Key[Array, "B"] | None
    ) -> Float[Array, "B Q P"]:
        """Predicts the patches of `ids_shuffle` (B, K + Q) after the kept ones, in its order, float32."""
        kept = latent.shape[-2] - self.num_cls
        return self._predict(latent, self.positions(self.dtype)[0][ids_shuffle[:, kept:]], keys)

    def _predict(
        self, latent: Float[Array, "*S B N D"], positions: Float[Array, "B Q E"], keys: Key[Array, "B"] | None
    ) -> Float[Array, "B Q P"]:
        """Returns the values of the patches at these positions, float32."""
        batch, count, dim = positions.shape
        x = token_value(self.mask_token, batch, count, dim, self.dtype) + positions  # (B, Q, E)
        x = layer_norm(self.norm, self.stack(x, keys, memory=latent))
        return linear(self.pred, x, affine=self.hooks.affine).astype(jnp.float32)
