"""Functions that layers are made of, with gradients of their own where those of JAX are slow on a CPU.

Parameters are float32; matrix products run in a module's `dtype`; normalisation statistics are float32. Randomness
comes in as one key per example, `keys` (B,), or None for a deterministic pass, so that dropout of an example does not
depend on which batch or device holds it.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mae_dist.model.by_platform import by_platform
from mae_dist.model.onednn import computes_for_itself, in_use, matmul


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

    return by_platform(x, cpu=product, default=lambda x: x.sum(axis=tuple(range(rows))))


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
    return by_platform(a, b, cpu=as_matrices, default=as_it_is)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def affine(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, inputs: int) -> jax.Array:
    """x (*rows, *in) times kernel (*in, *out), with `inputs` axes of input, plus bias (*out): (*rows, *out)."""
    product = _contract(x, kernel, inputs, ("last", "first"))
    return product if bias is None else product + bias


def _affine_forward(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, inputs: int) -> Any:
    return affine(x, kernel, bias, inputs), (x, kernel, None if bias is None else ())


def _affine_backward(inputs: int, saved: Any, grad: jax.Array) -> Any:
    x, kernel, bias = saved  # of the bias only whether there is one
    rows, outputs = x.ndim - inputs, kernel.ndim - inputs
    return (
        _contract(grad, kernel, outputs, ("last", "last")),
        _contract(x, grad, rows, ("first", "first")),
        _sum_rows(grad, rows) if bias is not None else None,
    )


affine.defvjp(_affine_forward, _affine_backward)


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
    return affine(x.astype(module.dtype), kernel.astype(module.dtype), bias, inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """x (*rows, D) with mean 0 and variance 1 over D, times scale (D,), plus bias (D,)."""
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


normalize.defvjp(_normalize_forward, _normalize_backward)


def layer_norm(norm: nnx.LayerNorm, x: jax.Array) -> jax.Array:
    """Applies `norm` in float32 to x (*rows, D) and returns x's own dtype."""
    assert norm.scale is not None
    assert norm.bias is not None

    def as_it_is(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        return normalize(x, scale, bias, norm.epsilon)

    def as_matrix(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        return as_it_is(x.reshape(-1, x.shape[-1]), scale, bias).reshape(x.shape)

    args: Any = (x.astype(jnp.float32), norm.scale[...], norm.bias[...])
    if computes_for_itself():  # in the shape in which the product that follows takes it, one array serves both
        return by_platform(*args, cpu=as_matrix, default=as_it_is).astype(x.dtype)
    return as_it_is(*args).astype(x.dtype)


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
