"""Layers of a vision transformer: attention, MLP, LayerScale, DropPath, the pre-norm block and a stack of blocks.

Shapes: B batch, N tokens, D width, H heads, hd = D / H, M MLP width. Parameters are float32; matrix products run in
`dtype`; normalisation statistics and softmax are float32. Randomness comes in as one key per example, `keys` (B,), or
None for a deterministic pass, so that dropout of an example does not depend on which batch or device holds it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

CLS_TOKENS = ("learned", "zero", "none")
MASK_TOKENS = ("learned", "zero")
REMAT_POLICIES = ("none", "blocks", "dots")
# A hook that pins an activation's layout; the models know logical axes only, never a mesh.
Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]
TOKENS = ("batch", "patches", None)

xavier = nnx.initializers.xavier_uniform()
normal02 = nnx.initializers.normal(0.02)


def unconstrained(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """The hook of a single device: leaves `x` as it is."""
    del axes
    return x


def fold_in(keys: jax.Array | None, data: Any) -> jax.Array | None:
    """Per-example keys (B,) for another purpose; None stays None."""
    return None if keys is None else jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)


def dropout(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    """Zeroes single values of x (B, ...) with probability `rate` and scales the rest by 1 / (1 - rate)."""
    if keys is None or rate == 0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros_like(x))


def drop_path(x: jax.Array, rate: Any, keys: jax.Array | None) -> jax.Array:
    """Zeroes whole examples of a residual branch x (B, N, D) with probability `rate`, which may be traced.

    Stochastic depth of Huang et al. 2016; what is kept is scaled by 1 / (1 - rate).
    """
    if keys is None:
        return x
    keep = jax.vmap(lambda key: jax.random.uniform(key) >= rate)(keys)  # (B,)
    scale = jnp.where(keep, 1 / (1 - rate), 0.0).astype(x.dtype)
    return x * scale[:, None, None]


def layer_norm(norm: nnx.LayerNorm, x: jax.Array) -> jax.Array:
    """Applies `norm` in float32 and returns x's own dtype."""
    return norm(x.astype(jnp.float32)).astype(x.dtype)


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(hd)) v for (B, N, H, hd) operands, softmax in float32."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * (q.shape[-1] ** -0.5)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores).astype(v.dtype), v)


class Attention(nnx.Module):
    """Multi-head self-attention; q, k and v come from one product whose weights split along heads."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool, dtype: Any, rngs: nnx.Rngs):
        head_dim = dim // num_heads
        linear = functools.partial(nnx.LinearGeneral, dtype=dtype, kernel_init=xavier, rngs=rngs)
        self.qkv = linear(dim, (3, num_heads, head_dim), use_bias=qkv_bias)
        self.out = linear((num_heads, head_dim), dim, axis=(-2, -1))

    def __call__(self, x: jax.Array) -> jax.Array:
        qkv = self.qkv(x)  # (B, N, 3, H, hd)
        return self.out(attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]))  # (B, N, D)


class Mlp(nnx.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int, *, gelu: str, dtype: Any, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, dtype=dtype, kernel_init=xavier, rngs=rngs)
        self.fc1 = linear(dim, hidden_dim)
        self.fc2 = linear(hidden_dim, dim)
        self.approximate = gelu == "tanh"

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=self.approximate))


class Block(nnx.Module):
    """Pre-norm transformer block with optional LayerScale (Touvron et al. 2021), dropout and DropPath."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        gelu: str,
        layer_scale_init: float,
        norm_eps: float,
        dropout: float,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.norm1 = nnx.LayerNorm(dim, epsilon=norm_eps, rngs=rngs)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.norm2 = nnx.LayerNorm(dim, epsilon=norm_eps, rngs=rngs)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), gelu=gelu, dtype=dtype, rngs=rngs)
        self.scaled = layer_scale_init > 0
        if self.scaled:
            self.scale1 = nnx.Param(jnp.full((dim,), layer_scale_init))
            self.scale2 = nnx.Param(jnp.full((dim,), layer_scale_init))
        self.dropout = dropout

    def __call__(self, x: jax.Array, drop_path_rate: Any, keys: jax.Array | None) -> jax.Array:
        for site, (norm, layer) in enumerate(((self.norm1, self.attn), (self.norm2, self.mlp))):
            branch = layer(layer_norm(norm, x))  # (B, N, D)
            if self.scaled:
                branch = branch * (self.scale1, self.scale2)[site][...].astype(x.dtype)
            branch = dropout(branch, self.dropout, fold_in(keys, 2 * site))
            if drop_path_rate is not None:
                branch = drop_path(branch, drop_path_rate, fold_in(keys, 2 * site + 1))
            x = x + branch
        return x


class Stack(nnx.Module):
    """`depth` equal blocks whose parameters lie stacked along a leading axis, applied by a scan or one after another.

    The stored layout is the same either way, so `scan` and `remat` may change between runs of one checkpoint.
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        drop_path: float,
        scan: bool,
        remat: str,
        constrain: Constrain,
        rngs: nnx.Rngs,
        **block: Any,
    ):
        keys = jax.random.split(rngs.params(), depth)
        self.blocks = nnx.vmap(lambda key: Block(dim, rngs=nnx.Rngs(key), **block))(keys)
        self.depth = depth
        self.drop_path = drop_path
        self.stochastic = drop_path > 0 or block["dropout"] > 0
        self.scan = scan
        self.remat = remat
        self.constrain = constrain

    def __call__(self, x: jax.Array, keys: jax.Array | None, num_blocks: int | None = None) -> jax.Array:
        """x (B, N, D) -> (B, N, D), through the first `num_blocks` blocks or all of them."""
        depth = self.depth if num_blocks is None else num_blocks
        graphdef, params = nnx.split(self.blocks)
        if not self.stochastic:
            keys = None
        # Stochastic depth grows linearly with depth, as in the paper's fine-tuning recipe.
        rates = np.linspace(0, self.drop_path, self.depth, dtype=np.float32)

        def apply(x: jax.Array, layer: tuple[Any, Any, Any]) -> tuple[jax.Array, None]:
            block_params, index, rate = layer
            block = nnx.merge(graphdef, block_params)
            x = block(x, rate if self.drop_path > 0 else None, fold_in(keys, index))
            return self.constrain(x, TOKENS), None

        if self.remat != "none":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.remat == "dots" else None
            apply = jax.checkpoint(apply, policy=policy, prevent_cse=not self.scan)
        x = self.constrain(x, TOKENS)
        if self.scan:
            layers = (params, jnp.arange(self.depth), jnp.asarray(rates))
            return jax.lax.scan(apply, x, jax.tree.map(lambda p: p[:depth], layers))[0]
        for index in range(depth):
            x, _ = apply(x, (jax.tree.map(lambda p, i=index: p[i], params), index, rates[index]))
        return x
