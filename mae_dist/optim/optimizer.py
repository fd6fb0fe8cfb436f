"""The optimizer from the fields of `config.optim`; its learning rate is an argument of every step.

An optimizer is one function, in this file or in a module of your own that `config.imports` names:

    @mae_dist.optim.register("lion")
    def lion(*, b1, b2):  # fields of config.optim
        return optax.scale_by_lion(b1, b2)
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from mae_dist.model.parameters import BLOCK, EMBEDDING, Parameter
from mae_dist.optim.muon import muon_or_adam
from mae_dist.registry import Registry, named_arguments

Function = TypeVar("Function", bound=Callable[..., Any])

OPTIMIZERS: Registry[Callable[..., Any]] = Registry("optim.name")


def register(name: str) -> Callable[[Function], Function]:
    """Decorates the function that makes an optimizer; `config.optim.name` then accepts `name`.

    The function returns an optax transformation of gradients for a learning rate of 1 (`optax.scale_by_…`), or a
    sequence of them. Clipping before it, and decoupled weight decay, layer decay, the learning rate and the skipping of
    non-finite steps after it are added for it.

    As keyword-only arguments it may take the fields of `config.optim`; `rows`, a tree like the parameters of their rows
    in the table of parameters; and `decay`, a list of the transformation that adds weight decay, empty for none: an
    optimizer that takes `decay` has to apply it itself.

    Raises:
      ConfigError: another function has the name.
    """

    def add(function: Function) -> Function:
        OPTIMIZERS.add(name, function, function)
        return function

    return add


def decay_mask(rows: PyTree) -> PyTree:
    """Returns the parameters that weight decay applies to, a tree of bools like `rows`."""
    return jax.tree.map(lambda row: row.decays, rows)


def _scale_by_trust_ratio(rows: PyTree, trust_coefficient: float) -> optax.GradientTransformation:
    """Scales by LARS's trust_coefficient * |parameter| / |update| (You et al. 2017), where weight decay applies.

    A stack of blocks has one factor per block. Under jit the norms of sharded arrays are those of the whole arrays.
    """
    trust = optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient)

    def scale_one(update: jax.Array, param: jax.Array) -> PyTree:
        return trust.update(update, optax.EmptyState(), param)[0]

    def scale(row: Parameter, update: jax.Array, param: jax.Array) -> jax.Array:
        if not row.decays:
            return update
        return (jax.vmap(scale_one) if row.is_stacked else scale_one)(update, param)

    return optax.stateless(lambda updates, params: jax.tree.map(scale, rows, updates, params))


def layer_scales(rows: PyTree, params: PyTree, layer_decay: float) -> PyTree:
    """Returns learning-rate factors that shrink with the distance to the head (Clark et al. 2020; BEiT, MAE).

    layer_decay ** (depth + 1 - id) with id 0 for the encoder's embeddings, i + 1 for its block i and depth + 1 for the
    rest: a tree like `rows` and `params` (arrays or shapes) of float32 arrays that broadcast against them.
    """
    depth = jax.tree.leaves(params["encoder"]["stack"]["blocks"])[0].shape[0]

    def scale(row: Parameter, leaf: Any) -> np.ndarray:
        if row.layer == BLOCK:
            ids = np.arange(1, depth + 1).reshape(depth, *[1] * (len(leaf.shape) - 1))
        else:
            ids = np.asarray(0 if row.layer == EMBEDDING else depth + 1)
        return np.asarray(layer_decay ** (depth + 1 - ids), np.float32)

    return jax.tree.map(scale, rows, params)


def _skip_nonfinite(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Skips steps whose gradient has no finite norm in float32; otherwise as `optax.apply_if_finite`, with its state.

    The norm is computed anyway, and the selection of old or new values fuses with the operations that compute them. A
    test and a branch for every array took a CPU seconds to compile and copied all moments once more.
    """

    def init(params: PyTree) -> optax.ApplyIfFiniteState:
        zero = jnp.zeros((), jnp.int32)
        return optax.ApplyIfFiniteState(zero, jnp.array(True), zero, inner.init(params))

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, optax.ApplyIfFiniteState]:
        finite = jnp.isfinite(optax.tree.norm(updates))
        bad = 1 - finite.astype(jnp.int32)
        new, inner_state = inner.update(updates, state.inner_state, params)
        select = functools.partial(jnp.where, finite)
        return jax.tree.map(lambda u: select(u, jnp.zeros_like(u)), new), optax.ApplyIfFiniteState(
            notfinite_count=bad * (state.notfinite_count + 1),
            last_finite=finite,
            total_notfinite=state.total_notfinite + bad,
            inner_state=jax.tree.map(select, inner_state, state.inner_state),
        )

    return optax.GradientTransformation(init, update)


@register("adamw")
def _adamw(*, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=b1, b2=b2, eps=eps)


@register("muon")
def _muon(*, rows: PyTree, b1: float, b2: float, eps: float, momentum: float) -> optax.GradientTransformation:
    return muon_or_adam(rows, b1=b1, b2=b2, eps=eps, momentum=momentum)


@register("sgd")
def _sgd(*, momentum: float, decay: list[optax.GradientTransformation]) -> list[optax.GradientTransformation]:
    """Adds decay to the gradient that momentum accumulates, as PyTorch does.

    In checkpoints the (empty) state of decay follows momentum's.
    """
    trace = optax.trace(momentum)

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        for part in decay:
            updates, _ = part.update(updates, part.init(params), params)
        return trace.update(updates, state, params)

    def unchanged(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        del params
        return updates, state

    behind = [optax.GradientTransformation(part.init, unchanged) for part in decay]
    return [optax.GradientTransformation(trace.init, update), *behind]


@register("lars")
def _lars(
    *, rows: PyTree, momentum: float, trust_coefficient: float, decay: list[optax.GradientTransformation]
) -> list[optax.GradientTransformation]:
    """Adds decay to the gradient before its norm is taken; momentum comes last."""
    return [*decay, _scale_by_trust_ratio(rows, trust_coefficient), optax.trace(momentum)]


def _direction(
    rows: PyTree, name: str, weight_decay: float, fields: Mapping[str, float]
) -> Sequence[optax.GradientTransformation]:
    """Returns the transformations of the optimizer `name`, followed by weight decay unless it applies that itself."""
    decay = [optax.add_decayed_weights(weight_decay, mask=decay_mask(rows))] if weight_decay > 0 else []
    offered = {**fields, "weight_decay": weight_decay, "rows": rows, "decay": decay}
    make = OPTIMIZERS.get(name)
    asked = named_arguments(make, offered, f"the function of optim.name={name!r}")
    made = make(**asked)
    # A transformation is a tuple itself.
    parts = [made] if isinstance(made, optax.GradientTransformation) else list(made)
    return parts if "decay" in asked else [*parts, *decay]


def _scale_by_given_rate() -> optax.GradientTransformationExtraArgs:
    """Multiplies by the negative of the extra argument `learning_rate`, a scalar.

    Its state is that of `optax.scale_by_schedule`, which checkpoints have.
    """

    def init(params: PyTree) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: jax.Array
    ) -> tuple[PyTree, optax.ScaleByScheduleState]:
        scaled = jax.tree.map(lambda u: -extra["learning_rate"].astype(u.dtype) * u, updates)
        return scaled, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def make_optimizer(
    rows: PyTree,
    *,
    name: str,
    b1: float,
    b2: float,
    eps: float,
    momentum: float,
    trust_coefficient: float,
    weight_decay: float,
    layer_decay: float,
    clip_norm: float,
    clip_value: float,
) -> optax.GradientTransformationExtraArgs:
    """Chains clipping, the optimizer `name`, weight decay, and the scale by `update(…, learning_rate=)`.

    `rows` is a tree like the trainable parameters, of their rows in the table of parameters.

    A step whose gradient has no finite norm changes neither parameters nor moments; the transformation counts such
    steps. The learning rate is outside that guard, so it follows the step number, skipped or not.
    """
    parts = []
    if clip_value > 0:
        parts.append(optax.clip(clip_value))
    if clip_norm > 0:
        parts.append(optax.clip_by_global_norm(clip_norm))
    fields = {"b1": b1, "b2": b2, "eps": eps, "momentum": momentum, "trust_coefficient": trust_coefficient}
    parts += _direction(rows, name, weight_decay, fields)
    if layer_decay < 1:
        by_layer = functools.partial(layer_scales, rows, layer_decay=layer_decay)
        parts.append(optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, by_layer(updates))))
    guarded = _skip_nonfinite(optax.chain(*parts))
    return optax.chain(guarded, _scale_by_given_rate())


def nonfinite_counts(opt_state: PyTree) -> tuple[jax.Array, jax.Array]:
    """Returns the skipped steps (in a row, in total), int32 scalars, from the state of `make_optimizer`'s result."""
    guard = opt_state[0]
    assert isinstance(guard, optax.ApplyIfFiniteState), type(guard)
    return guard.notfinite_count.astype(jnp.int32), guard.total_notfinite.astype(jnp.int32)
