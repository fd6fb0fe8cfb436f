"""Layers of a vision transformer: attention, MLP, LayerScale, DropPath, the pre-norm block and a stack of blocks.

Shapes: B batch, N tokens, D width, H heads, hd = D / H, M MLP width. Parameters are float32; matrix products run in
`dtype`; normalisation statistics and softmax are float32. Randomness comes in as one key per example, `keys` (B,), or
None for a deterministic pass, so that dropout of an example does not depend on which batch or device holds it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mae_dist.attention import attention
from mae_dist.onednn import computes_for_itself, in_use, matmul

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


def _sum_rows(x: jax.Array, rows: int) -> jax.Array:
    """Sums x over its first `rows` axes: gradients of biases and scales, over thousands of rows.

    On a CPU as a product with ones, which XLA's reductions there take three times as long for.
    """

    def product(x: jax.Array) -> jax.Array:
        axes = tuple(range(rows))
        return jax.lax.dot_general(jnp.ones(x.shape[:rows], x.dtype), x, ((axes, axes), ((), ())))

    return jax.lax.platform_dependent(x, cpu=product, default=lambda x: x.sum(axis=tuple(range(rows))))


def _contract(a: jax.Array, b: jax.Array, num: int, sides: tuple[str, str]) -> jax.Array:
    """The product of a and b summed over `num` axes of each, the `first` or `last` ones: (*rest of a, *rest of b).

    Where a device computes for itself, on a CPU, as a product of two matrices: there operands of more axes are first
    transposed, a tenth of the step. Elsewhere the axes stay, for the compiler splits heads over devices by them.
    """

    def axes(x: jax.Array, side: str) -> tuple[int, ...]:
        return tuple(range(num)) if side == "first" else tuple(range(x.ndim - num, x.ndim))

    def rest(x: jax.Array, side: str) -> tuple[int, ...]:
        return x.shape[num:] if side == "first" else x.shape[: x.ndim - num]

    by_onednn = in_use()  # the functions below are new ones every time, so JAX traces them every time

    def as_it_is(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.dot_general(a, b, ((axes(a, sides[0]), axes(b, sides[1])), ((), ())))

    def as_matrices(a: jax.Array, b: jax.Array) -> jax.Array:
        first, second = (
            x.reshape((-1, math.prod(rest(x, side))) if side == "first" else (math.prod(rest(x, side)), -1))
            for x, side in zip((a, b), sides, strict=True)
        )
        product = matmul(first, second, (sides[0] == "first", sides[1] == "last"), by_onednn)
        return product.reshape(*rest(a, sides[0]), *rest(b, sides[1]))

    if not computes_for_itself():
        return as_it_is(a, b)
    return jax.lax.platform_dependent(a, b, cpu=as_matrices, default=as_it_is)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _affine(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, inputs: int) -> jax.Array:
    """x (*rows, *in) times kernel (*in, *out), with `inputs` axes of input, plus bias (*out): (*rows, *out)."""
    product = _contract(x, kernel, inputs, ("last", "first"))
    return product if bias is None else product + bias


def _affine_forward(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, inputs: int) -> Any:
    return _affine(x, kernel, bias, inputs), (x, kernel, None if bias is None else ())


def _affine_backward(inputs: int, saved: Any, grad: jax.Array) -> Any:
    x, kernel, bias = saved  # of the bias only whether there is one
    rows, outputs = x.ndim - inputs, kernel.ndim - inputs
    return (
        _contract(grad, kernel, outputs, ("last", "last")),
        _contract(x, grad, rows, ("first", "first")),
        _sum_rows(grad, rows) if bias is not None else None,
    )


_affine.defvjp(_affine_forward, _affine_backward)


def linear(module: nnx.Linear | nnx.LinearGeneral, x: jax.Array, part: Any = None) -> jax.Array:
    """Applies a linear module to x (*rows, *in) in the module's dtype: (*rows, *out).

    `part` is an index into the first axis of the output: only that part is computed.
    """
    inputs = len(module.axis) if isinstance(module, nnx.LinearGeneral) else 1
    kernel: Any = module.kernel[...]
    bias: Any = None if module.bias is None else module.bias[...]
    if part is not None:
        kernel, bias = kernel[(slice(None),) * inputs + (part,)], None if bias is None else bias[part]
    bias = None if bias is None else bias.astype(module.dtype)
    return _affine(x.astype(module.dtype), kernel.astype(module.dtype), bias, inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalize(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    return _normalize_forward(x, scale, bias, eps)[0]


def _normalize_forward(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> Any:
    mean = x.mean(axis=-1, keepdims=True)
    centred = x - mean
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + eps)
    return centred * inverse * scale + bias, (x, mean, inverse, scale)


def _normalize_backward(eps: float, saved: Any, grad: jax.Array) -> Any:
    del eps
    x, mean, inverse, scale = saved
    normal = (x - mean) * inverse
    scaled = grad * scale
    dx = scaled - scaled.mean(axis=-1, keepdims=True) - normal * (scaled * normal).mean(axis=-1, keepdims=True)
    return inverse * dx, _sum_rows(grad * normal, x.ndim - 1), _sum_rows(grad, x.ndim - 1)


_normalize.defvjp(_normalize_forward, _normalize_backward)


def layer_norm(norm: nnx.LayerNorm, x: jax.Array) -> jax.Array:
    """Applies `norm` in float32 to x (*rows, D) and returns x's own dtype."""
    assert norm.scale is not None
    assert norm.bias is not None

    def as_it_is(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        return _normalize(x, scale, bias, norm.epsilon)

    def as_matrix(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        return as_it_is(x.reshape(-1, x.shape[-1]), scale, bias).reshape(x.shape)

    args: Any = (x.astype(jnp.float32), norm.scale[...], norm.bias[...])
    if computes_for_itself():  # in the shape in which the product that follows takes it, one array serves both
        return jax.lax.platform_dependent(*args, cpu=as_matrix, default=as_it_is).astype(x.dtype)
    return as_it_is(*args).astype(x.dtype)


def _unstack(x: jax.Array) -> list[jax.Array]:
    """(B, N, n, H, hd) -> n times (B, N, H, hd); the gradient of a split is a concatenation, of n slices n sums."""
    return [part[:, :, 0] for part in jax.lax.split(x, (1,) * x.shape[2], axis=2)]


class Attention(nnx.Module):
    """Multi-head self-attention; q, k and v come from one product whose weights split along heads."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool, dtype: Any, rngs: nnx.Rngs):
        head_dim = dim // num_heads
        make = functools.partial(nnx.LinearGeneral, dtype=dtype, kernel_init=xavier, rngs=rngs)
        self.qkv = make(dim, (3, num_heads, head_dim), use_bias=qkv_bias)
        self.out = make((num_heads, head_dim), dim, axis=(-2, -1))

    def __call__(self, x: jax.Array, num_out: int | None = None) -> jax.Array:
        """x (B, N, D) -> (B, N, D), or only the last `num_out` tokens, which look at all."""
        if num_out is None:
            qkv = linear(self.qkv, x)  # (B, N, 3, H, hd)
            q, k, v = _unstack(qkv)
        else:
            q = linear(self.qkv, x[:, -num_out:], 0)  # (B, num_out, H, hd)
            kv = linear(self.qkv, x, slice(1, 3))  # (B, N, 2, H, hd)
            k, v = _unstack(kv)
        return linear(self.out, attention(q, k, v))


def _normal_cdf(x: jax.Array, sign: float) -> jax.Array:
    """The share of a standard normal distribution below x, float32; `sign` is 1 or -1 and changes no value.

    A CPU's compiler that finds one expression in both directions keeps its values and reads them again, which takes
    longer than computing it twice: so the two are given different signs. (5 % of an update of `cifar_medium`.)
    """
    return 0.5 + (0.5 * sign) * jax.lax.erf(x * (sign * math.sqrt(0.5)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gelu(x: jax.Array, approximate: bool) -> jax.Array:
    """GELU of x in any shape, exact or by tanh; keeps nothing but x for its gradient, a third of what JAX would.

    Of float32 the exact one is PyTorch's formula, to 1e-7 of absolute error: below -5.5 it is 0.
    """
    if approximate or x.dtype != jnp.float32:
        return jax.nn.gelu(x, approximate=approximate)
    return x * _normal_cdf(x, 1)


def _gelu_forward(x: jax.Array, approximate: bool) -> Any:
    return gelu(x, approximate), x


def _gelu_backward(approximate: bool, x: jax.Array, grad: jax.Array) -> Any:
    if approximate or x.dtype != jnp.float32:
        return jax.vjp(functools.partial(jax.nn.gelu, approximate=approximate), x)[1](grad)
    density = jnp.exp(-0.5 * jnp.square(x)) * (1 / math.sqrt(2 * math.pi))
    return (grad * (_normal_cdf(x, -1) + x * density),)


gelu.defvjp(_gelu_forward, _gelu_backward)


class Mlp(nnx.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int, *, gelu: str, dtype: Any, rngs: nnx.Rngs):
        make = functools.partial(nnx.Linear, dtype=dtype, kernel_init=xavier, rngs=rngs)
        self.fc1 = make(dim, hidden_dim)
        self.fc2 = make(hidden_dim, dim)
        self.approximate = gelu == "tanh"

    def __call__(self, x: jax.Array) -> jax.Array:
        return linear(self.fc2, gelu(linear(self.fc1, x), self.approximate))


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
            self.scale1 = nnx.Param(jnp.full((dim,), layer_scale_init, jnp.float32))
            self.scale2 = nnx.Param(jnp.full((dim,), layer_scale_init, jnp.float32))
        self.dropout = dropout

    def __call__(
        self, x: jax.Array, drop_path_rate: Any, keys: jax.Array | None, num_out: int | None = None
    ) -> jax.Array:
        """x (B, N, D) -> (B, N, D), or only the last `num_out` tokens."""
        attend = functools.partial(self.attn, num_out=num_out)
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

    def __call__(
        self, x: jax.Array, keys: jax.Array | None, num_blocks: int | None = None, num_out: int | None = None
    ) -> jax.Array:
        """x (B, N, D) -> (B, N, D).

        Args:
          x: tokens.
          keys: one key per example for dropout and DropPath, or None.
          num_blocks: go through the first so many blocks; None for all.
          num_out: return the last so many tokens only, and spare the last block what the others would cost.
        """
        depth = self.depth if num_blocks is None else num_blocks
        graphdef, params = nnx.split(self.blocks)
        if not self.stochastic:
            keys = None
        # Stochastic depth grows linearly with depth, as in the paper's fine-tuning recipe.
        rates = np.linspace(0, self.drop_path, self.depth, dtype=np.float32)

        def apply(num_out: int | None, x: jax.Array, layer: tuple[Any, Any, Any]) -> tuple[jax.Array, None]:
            block_params, index, rate = layer
            block = nnx.merge(graphdef, block_params)
            x = block(x, rate if self.drop_path > 0 else None, fold_in(keys, index), num_out)
            return self.constrain(x, TOKENS), None

        whole, last = functools.partial(apply, None), functools.partial(apply, num_out)
        if self.remat != "none":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.remat == "dots" else None
            whole, last = (jax.checkpoint(f, policy=policy, prevent_cse=not self.scan) for f in (whole, last))
        x = self.constrain(x, TOKENS)
        num_alike = depth - 1 if num_out is not None else depth  # the last block is another function then
        if self.scan:
            layers = (params, jnp.arange(self.depth), jnp.asarray(rates))
            x, _ = jax.lax.scan(whole, x, jax.tree.map(lambda p: p[:num_alike], layers))
        scanned = num_alike if self.scan else 0
        # Taken apart by one split, whose gradient is a concatenation; of one slice a block, a sum of as many paddings.
        sizes = (scanned, *(1,) * (depth - scanned), self.depth - depth)
        leaves, structure = jax.tree.flatten(params)
        parts = [jax.lax.split(p, sizes) for p in leaves]
        for place, index in enumerate(range(scanned, depth), 1):
            layer = (structure.unflatten([part[place][0] for part in parts]), index, rates[index])
            x, _ = (whole if index < num_alike else last)(x, layer)
        return x
