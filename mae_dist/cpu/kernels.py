"""The model's functions with hand-written gradients, in the form that is fastest on a CPU; float32.

They are for programs in which each device computes its own examples (`parallel.shardings.on_each_device`): XLA could
not shard them over devices. They have no forward-mode derivative. docs/measurements.md says what each gains.

Shapes: B batch, N queries, M keys and values, H heads, hd width of a head, D model width.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from mae_dist.cpu.onednn import matmul
from mae_dist.model.attention import attention as plain_attention
from mae_dist.model.hooks import Hooks


@functools.cache
def make_hooks(by_onednn: bool) -> Hooks:
    """Returns the hooks of this file, with matmuls by oneDNN or by XLA; cached, so that JAX sees the same functions."""
    return Hooks(
        affine=functools.partial(_affine, by_onednn),
        gelu=_gelu_or_plain,
        attention=functools.partial(_attention, by_onednn),
    )


_swap_heads = functools.partial(jnp.swapaxes, axis1=1, axis2=2)  # (B, N, H, hd) and (B, H, N, hd)


def _sum_rows(x: jax.Array, rows: int) -> jax.Array:
    """Sums x over its first `rows` axes by a matmul with ones; XLA's reduction takes three times as long."""
    axes = tuple(range(rows))
    return jax.lax.dot_general(jnp.ones(x.shape[:rows], x.dtype), x, ((axes, axes), ((), ())))


def _contract(a: jax.Array, b: jax.Array, num: int, sides: tuple[str, str], by_onednn: bool) -> jax.Array:
    """Contracts `num` axes of a and b, the `first` or `last` ones, as a matmul of two matrices.

    XLA would transpose operands with more axes first, which takes a tenth of a step.
    """

    def rest(x: jax.Array, side: str) -> tuple[int, ...]:
        return x.shape[num:] if side == "first" else x.shape[: x.ndim - num]

    first, second = (
        x.reshape((-1, math.prod(rest(x, side))) if side == "first" else (math.prod(rest(x, side)), -1))
        for x, side in zip((a, b), sides, strict=True)
    )
    out = matmul(first, second, (sides[0] == "first", sides[1] == "last"), by_onednn)
    return out.reshape(*rest(a, sides[0]), *rest(b, sides[1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def _affine(by_onednn: bool, x: jax.Array, kernel: jax.Array, bias: jax.Array | None, inputs: int) -> jax.Array:
    out = _contract(x, kernel, inputs, ("last", "first"), by_onednn)
    return out if bias is None else out + bias


def _affine_forward(by_onednn: bool, x: jax.Array, kernel: jax.Array, bias: jax.Array | None, inputs: int) -> Any:
    return _affine(by_onednn, x, kernel, bias, inputs), (x, kernel, None if bias is None else ())


def _affine_backward(by_onednn: bool, inputs: int, saved: Any, grad: jax.Array) -> Any:
    x, kernel, bias = saved  # bias is () if there is one: its value is not needed
    rows, outputs = x.ndim - inputs, kernel.ndim - inputs
    return (
        _contract(grad, kernel, outputs, ("last", "last"), by_onednn),
        _contract(x, grad, rows, ("first", "first"), by_onednn),
        _sum_rows(grad, rows) if bias is not None else None,
    )


_affine.defvjp(_affine_forward, _affine_backward)


def _normal_cdf(x: jax.Array, sign: float) -> jax.Array:
    """Returns the standard normal distribution function of x; `sign` is 1 or -1 and changes no value.

    If forward and backward pass share an expression, XLA stores its values and reads them again, which takes longer
    than computing it twice. Different signs keep the two expressions apart.
    """
    return 0.5 + (0.5 * sign) * jax.lax.erf(x * (sign * math.sqrt(0.5)))


@jax.custom_vjp
def _gelu(x: jax.Array) -> jax.Array:
    """Returns the exact GELU by PyTorch's formula, to an absolute error of 1e-7; saves only x for its gradient."""
    return x * _normal_cdf(x, 1)


def _gelu_forward(x: jax.Array) -> Any:
    return _gelu(x), x


def _gelu_backward(x: jax.Array, grad: jax.Array) -> Any:
    density = jnp.exp(-0.5 * jnp.square(x)) * (1 / math.sqrt(2 * math.pi))
    return (grad * (_normal_cdf(x, -1) + x * density),)


_gelu.defvjp(_gelu_forward, _gelu_backward)


def _gelu_or_plain(x: jax.Array, approximate: bool) -> jax.Array:
    return jax.nn.gelu(x, approximate) if approximate or x.dtype != jnp.float32 else _gelu(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _heads_first(by_onednn: bool, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Computes attention with heads before tokens, so that no matmul transposes its operands.

    Queries are scaled instead of the scores, which are more. The softmax's gradient subtracts each row's mean gradient,
    weighted by the probabilities; it is computed from the output (B, N, H, hd), not from the scores (B, H, N, M).
    """
    return _heads_first_forward(by_onednn, q, k, v)[0]


def _heads_first_forward(by_onednn: bool, q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
    q, k, v = _swap_heads(q) * q.shape[-1] ** -0.5, _swap_heads(k), _swap_heads(v)  # (B, H, N, hd), 2 (B, H, M, hd)
    weights = jax.nn.softmax(matmul(q, k, (False, True), by_onednn))  # (B, H, N, M)
    out = matmul(weights, v, (False, False), by_onednn)  # (B, H, N, hd)
    return _swap_heads(out), (q, k, v, weights, out)


def _heads_first_backward(by_onednn: bool, saved: Any, grad: jax.Array) -> Any:
    q, k, v, weights, out = saved
    grad = _swap_heads(grad)  # (B, H, N, hd)
    mean = (grad * out).sum(axis=3, keepdims=True)  # (B, H, N, 1)
    scores = weights * (matmul(grad, v, (False, True), by_onednn) - mean)  # (B, H, N, M)
    dq = matmul(scores, k, (False, False), by_onednn) * q.shape[-1] ** -0.5
    dk = matmul(scores, q, (True, False), by_onednn)
    dv = matmul(weights, grad, (True, False), by_onednn)
    return _swap_heads(dq), _swap_heads(dk), _swap_heads(dv)


_heads_first.defvjp(_heads_first_forward, _heads_first_backward)


def _attention(by_onednn: bool, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return _heads_first(by_onednn, q, k, v) if q.dtype == jnp.float32 else plain_attention(q, k, v)
