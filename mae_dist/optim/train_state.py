"""The training state: a step count, parameters and optimizer state, created in place on the mesh."""

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import PyTree

from mae_dist.model.build import Params
from mae_dist.parallel import shardings


@struct.dataclass
class TrainState:
    """The state of the optimisation: arrays, or their shapes, or their shardings.

    step: int32 scalar, steps done. params: nested dict of float32 arrays. opt_state: of the trainable parameters.
    ema: their exponential moving average, a tree like them; None without one.
    """

    step: PyTree
    params: PyTree
    opt_state: PyTree
    ema: PyTree = None

    @property
    def averaged(self) -> Params:
        """Returns the parameters to evaluate and export: the moving averages if there are any."""
        return {**self.params, **(self.ema or {})}

    def to_dict(self) -> dict[str, PyTree]:
        """Returns what a checkpoint stores, by name; no `ema` if there is none."""
        return {name: value for name, value in vars(self).items() if value is not None}


def split_frozen(params: Params, frozen: tuple[str, ...]) -> tuple[Params, Params]:
    """Splits the groups of `params` into (trainable, frozen)."""
    return {k: v for k, v in params.items() if k not in frozen}, {k: v for k, v in params.items() if k in frozen}


def begin(params: Params, tx: optax.GradientTransformation, frozen: tuple[str, ...], has_ema: bool) -> TrainState:
    """Returns the state at step 0 with these parameters."""
    trainable, _ = split_frozen(params, frozen)
    ema = trainable if has_ema else None
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(trainable), ema=ema)


def state_shardings(
    mesh: Mesh, abstract: TrainState, tx: optax.GradientTransformation, frozen: tuple[str, ...], shard_state: bool
) -> TrainState:
    """Returns a NamedSharding for every array of the state: moments as their parameters, counters replicated.

    With `shard_state` trainable parameters, moments and averages are split over the data axis as well; frozen
    parameters, which no step updates, stay as forward passes take them.
    """
    params = shardings.param_shardings(mesh, abstract.params)
    trainable, rest = split_frozen(params, frozen)
    if shard_state:
        shapes, _ = split_frozen(abstract.params, frozen)
        trainable = jax.tree.map(lambda held, leaf: shardings.split_state(held, leaf.shape), trainable, shapes)
    params = {**trainable, **rest}
    whole = shardings.replicated(mesh)

    def is_masked(part: PyTree) -> bool:  # where one of several optimizers updates other parameters
        return isinstance(part, optax.MaskedNode)

    opt_state = optax.tree.map_params(
        tx,
        lambda part, sharding: part if is_masked(part) else sharding,
        abstract.opt_state,
        trainable,
        transform_non_params=lambda _: whole,
        is_leaf=is_masked,
    )
    ema = trainable if abstract.ema is not None else None
    return TrainState(step=whole, params=params, opt_state=opt_state, ema=ema)
