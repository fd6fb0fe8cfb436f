"""Transformer layers: attention, MLP, the pre-norm block with LayerScale and DropPath, a stack of blocks.

Shapes: B batch, N tokens, D width, H heads, hd = D / H, M MLP width, S blocks of a stack.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from mae_dist.model import functional
from mae_dist.model.functional import drop_path, dropout, fold_in, layer_norm
from mae_dist.model.hooks import PLAIN, Hooks

CLS_TOKENS = ("learned", "zero", "none")
MASK_TOKENS = ("learned", "zero")
DECODERS = ("full", "cross")
REMAT_POLICIES = ("auto", "none", "blocks", "dots")
TOKENS = ("batch", "patches", None)

xavier = nnx.initializers.xavier_uniform()
normal02 = nnx.initializers.normal(0.02)


def count_cls_tokens(cls_token: str, cls_tokens: int) -> int:
    """Returns how many class tokens a model with these fields of `config.model` has."""
    return 0 if cls_token == "none" else cls_tokens


def token(kind: str, dim: int, rngs: nnx.Rngs, count: int = 1) -> nnx.Param[jax.Array] | None:
    """Returns learned tokens (1, count, dim) ~ N(0, 0.02), or None for constant zeros."""
    return nnx.Param(normal02(rngs.params(), (1, count, dim), jnp.float32)) if kind == "learned" else None


def token_value(
    param: nnx.Param[jax.Array] | None, batch: Any, count: int, dim: int, dtype: Any
) -> Float[Array, "B count dim"]:
    """Repeats one token `count` times, or the `count` tokens that there are, for each example.

    `batch` is an int or, in an export, a symbolic dimension.
    """
    value = jnp.zeros((1, 1, dim), dtype) if param is None else param[...].astype(dtype)
    return jnp.broadcast_to(value, (batch, count, dim))


def unstack(x: Float[Array, "B N n H hd"]) -> list[Float[Array, "B N H hd"]]:
    """Splits axis 2. The gradient of a split is one concatenation; that of n slices would be n sums."""
    return [part[:, :, 0] for part in jax.lax.split(x, (1,) * x.shape[2], axis=2)]


class Attention(nnx.Module):
    """Multi-head self-attention; one matmul computes q, k and v, its weights sharded along heads."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool, dtype: Any, rngs: nnx.Rngs, hooks: Hooks = PLAIN):
        head_dim = dim // num_heads
        make = functools.partial(nnx.LinearGeneral, dtype=dtype, kernel_init=xavier, rngs=rngs)
        self.qkv = make(dim, (3, num_heads, head_dim), use_bias=qkv_bias)
        self.out = make((num_heads, head_dim), dim, axis=(-2, -1))
        self.hooks = hooks

    def __call__(self, x: Float[Array, "B N D"], num_out: int | None = None) -> Float[Array, "B n_out D"]:
        """Returns all tokens, or only the last `num_out`; every query attends to all tokens."""
        linear = functools.partial(functional.linear, affine=self.hooks.affine)
        if num_out is None:
            qkv = linear(self.qkv, x)  # (B, N, 3, H, hd)
            q, k, v = unstack(qkv)
        else:
            q = linear(self.qkv, x[:, -num_out:], 0)  # (B, num_out, H, hd)
            kv = linear(self.qkv, x, slice(1, 3))  # (B, N, 2, H, hd)
            k, v = unstack(kv)
        return linear(self.out, self.hooks.attention(q, k, v))


class Mlp(nnx.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int, *, gelu: str, dtype: Any, rngs: nnx.Rngs, hooks: Hooks = PLAIN):
        make = functools.partial(nnx.Linear, dtype=dtype, kernel_init=xavier, rngs=rngs)
        self.fc1 = make(dim, hidden_dim)
        self.fc2 = make(hidden_dim, dim)
        self.approximate = gelu == "tanh"
        self.hooks = hooks

    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        linear = functools.partial(functional.linear, affine=self.hooks.affine)
        return linear(self.fc2, self.hooks.gelu(linear(self.fc1, x), self.approximate))


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
        hooks: Hooks = PLAIN,
        attention: Callable[..., nnx.Module] = Attention,
    ):
        self.norm1 = nnx.LayerNorm(dim, epsilon=norm_eps, rngs=rngs)
        self.attn = attention(dim, num_heads, qkv_bias=qkv_bias, dtype=dtype, hooks=hooks, rngs=rngs)
        self.norm2 = nnx.LayerNorm(dim, epsilon=norm_eps, rngs=rngs)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), gelu=gelu, dtype=dtype, hooks=hooks, rngs=rngs)
        self.scaled = layer_scale_init > 0
        if self.scaled:
            self.scale1 = nnx.Param(jnp.full((dim,), layer_scale_init, jnp.float32))
            self.scale2 = nnx.Param(jnp.full((dim,), layer_scale_init, jnp.float32))
        self.dropout, self.hooks = dropout, hooks

    def __call__(
        self,
        x: Float[Array, "B N D"],
        drop_path_rate: Any,
        keys: Key[Array, "B"] | None,
        num_out: int | None = None,
        memory: jax.Array | None = None,
    ) -> Float[Array, "B n_out D"]:
        """Returns all tokens, or only the last `num_out`; `memory` is what cross-attention reads."""
        attend = functools.partial(self.attn, **({"num_out": num_out} if memory is None else {"memory": memory}))
        for site, (norm, layer) in enumerate(((self.norm1, attend), (self.norm2, self.mlp))):
            branch = layer(layer_norm(norm, x))  # (B, N, D)
            if num_out is not None:
                x = x[:, -num_out:]
            if self.scaled:
                branch = branch * (self.scale1, self.scale2)[site][...].astype(x.dtype)
            branch = dropout(branch, self.dropout, fold_in(keys, 2 * site))
            if drop_path_rate is not None:
                branch = drop_path(branch, drop_path_rate, fold_in(keys, 2 * site + 1))
            x = x + branch
        return x


class Stack(nnx.Module):
    """`depth` equal blocks, their parameters stacked along a leading axis, applied by a scan or one by one.

    The parameters are laid out the same either way, so a checkpoint may be continued with another `scan` or `remat`.
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        drop_path: float,
        scan: bool,
        remat: str,
        hooks: Hooks,
        rngs: nnx.Rngs,
        **block: Any,
    ):
        keys = jax.random.split(rngs.params(), depth)
        self.blocks = nnx.vmap(lambda key: Block(dim, hooks=hooks, rngs=nnx.Rngs(key), **block))(keys)
        self.depth = depth
        self.drop_path = drop_path
        self.stochastic = drop_path > 0 or block["dropout"] > 0
        self.scan = scan
        self.remat = remat
        self.hooks = hooks

    def __call__(
        self,
        x: Float[Array, "B N D"],
        keys: Key[Array, "B"] | None,
        num_blocks: int | None = None,
        num_out: int | None = None,
        memory: jax.Array | None = None,
        every_block: bool = False,
    ) -> Float[Array, "*S B n_out D"]:
        """Applies the blocks.

        Args:
          x: tokens.
          keys: for dropout and DropPath; None for neither.
          num_blocks: apply only the first `num_blocks`.
          num_out: return only the last `num_out` tokens, so that the last block computes no others.
          memory: what every block's cross-attention reads.
          every_block: return the tokens after each block (S, B, N, D), not only those after the last.
        """
        depth = self.depth if num_blocks is None else num_blocks
        graphdef, params = nnx.split(self.blocks)
        if not self.stochastic:
            keys = None
        # Stochastic depth grows linearly with depth, as in the paper's fine-tuning recipe.
        rates = np.linspace(0, self.drop_path, self.depth, dtype=np.float32)

        def apply(num_out: int | None, x: jax.Array, layer: tuple[Any, Any, Any]) -> tuple[jax.Array, Any]:
            block_params, index, rate = layer
            block = nnx.merge(graphdef, block_params)
            x = block(x, rate if self.drop_path > 0 else None, fold_in(keys, index), num_out, memory)
            x = self.hooks.constrain(x, TOKENS)
            return x, x if every_block else None

        whole, last = functools.partial(apply, None), functools.partial(apply, num_out)
        if self.remat in ("dots", "blocks"):  # "auto" is left where no training has chosen
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.remat == "dots" else None
            whole, last = (jax.checkpoint(f, policy=policy, prevent_cse=not self.scan) for f in (whole, last))
        x = self.hooks.constrain(x, TOKENS)
        outputs: Any = None
        num_alike = depth - 1 if num_out is not None else depth  # with `num_out` the last block is another function
        if self.scan:
            layers = (params, jnp.arange(self.depth), jnp.asarray(rates))
            x, outputs = jax.lax.scan(whole, x, jax.tree.map(lambda p: p[:num_alike], layers))
        scanned = num_alike if self.scan else 0
        # One split of the stack, because its gradient is one concatenation; slices would give a sum of padded arrays.
        sizes = (scanned, *(1,) * (depth - scanned), self.depth - depth)
        leaves, structure = jax.tree.flatten(params)
        parts = [jax.lax.split(p, sizes) for p in leaves]
        unrolled = []
        for place, index in enumerate(range(scanned, depth), 1):
            layer = (structure.unflatten([part[place][0] for part in parts]), index, rates[index])
            x, output = (whole if index < num_alike else last)(x, layer)
            unrolled.append(output)
        if every_block:
            return outputs if self.scan else jnp.stack(unrolled)
        return x
