"""The compiled update: a pure function of (state, batch, hyperparams), sharded, the state donated."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mae_dist.cpu import cores, folding
from mae_dist.optim.hyperparams import Hyperparams
from mae_dist.optim.optimizer import nonfinite_counts
from mae_dist.optim.train_state import TrainState, split_frozen
from mae_dist.parallel.shardings import (
    batch_sharding,
    is_by_cores,
    is_data_parallel,
    on_each_device,
    replicate,
    replicated,
)
from mae_dist.tasks.base import Batch, Task

Gradient = Callable[..., tuple[Any, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """One run's update: (TrainState, Batch) -> (TrainState, dict of scalars), the old state donated.

    program: (state, batch, hyperparams) -> (state, metrics), which compiles on first call, or what was compiled ahead.
    hyperparams: its last argument, by which this run differs from others of the same program.
    mesh: what it runs on.
    """

    program: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    hyperparams: Hyperparams
    mesh: Mesh

    @functools.cached_property
    def _placed(self) -> Hyperparams:
        """The hyperparameters on the devices, put there by the first call."""
        return replicate(self.hyperparams, self.mesh)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[Any, dict[str, jax.Array]]:
        return self.program(state, batch, self._placed)

    def trace(self, state: TrainState, batch: Any) -> jax.stages.Traced:
        """Traces the program for arrays like these, or for shapes of them."""
        assert isinstance(self.program, jax.stages.Wrapped), "compiled ahead"
        return self.program.trace(state, batch, self.hyperparams)

    def lower(self, state: TrainState, batch: Any) -> jax.stages.Lowered:
        return self.trace(state, batch).lower()

    def compiled(self, lowered: jax.stages.Lowered, **options: Any) -> "TrainStep":
        """Returns the same update by the executable of what `lower` gave; `options` are those of its `compile`."""
        return dataclasses.replace(self, program=lowered.compile(**options))


def _split_microbatches(batch: Any, accum_steps: int, rows_together: int) -> Any:
    """(B, ...) -> (A, B / A, ...), taking every A-th row so that each device splits its own rows and none move.

    Of rows that must stay together (`Task.rows_together`) it takes every A-th group.
    """

    def split(x: jax.Array) -> jax.Array:
        rest = x.shape[1:]
        groups = x.reshape(x.shape[0] // (accum_steps * rows_together), accum_steps, rows_together, *rest)
        return jnp.moveaxis(groups, 1, 0).reshape(accum_steps, x.shape[0] // accum_steps, *rest)

    return jax.tree.map(split, batch)


def _join_microbatches(x: jax.Array, rows_together: int) -> jax.Array:
    """The inverse of `_split_microbatches` for one array: (A, B / A, ...) -> (B, ...)."""
    count, rest = x.shape[0], x.shape[2:]
    groups = x.reshape(count, -1, rows_together, *rest)
    return jnp.moveaxis(groups, 0, 1).reshape(-1, *rest)


def _is_integer(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.integer)


def _reduce(x: jax.Array) -> jax.Array:
    """A metric of examples (B,) to one of all: their mean, or the sum of integers."""
    return x.sum(dtype=x.dtype) if _is_integer(x) else x.mean()


def _divide(sums: Any, count: int) -> Any:
    """Means of what was summed over `count` equal shares; of integers the sums."""
    return sums if count == 1 else jax.tree.map(lambda x: x if _is_integer(x) else x / count, sums)


def _average(ema: Any, new: Any, step: jax.Array, decay: float) -> Any:
    """The exponential moving average after update `step` (from 0), of parameters that became `new`.

    Early on it reaches over about a tenth of the updates done: over 1 / (1 - decay) it would be the initial weights.
    """
    done = step.astype(jnp.float32)
    rate = 1 - jnp.minimum(decay, (1 + done) / (10 + done))
    return jax.tree.map(lambda average, value: average + rate * (value - average), ema, new)


def _make_to_features(task: Task, mesh: Mesh, pieces: int) -> Callable[[Any, Batch], Batch]:
    """(params, batch) -> the batch with `features` of a frozen encoder in the place of images, computed in pieces."""

    def compute(params: Any, images: Batch) -> jax.Array:
        assert task.features is not None
        split = _split_microbatches(images, pieces, task.rows_together)
        return _join_microbatches(jax.lax.map(functools.partial(task.features, params), split), task.rows_together)

    if is_data_parallel(mesh):
        compute = on_each_device(compute, mesh, num_whole=1, combine=None)

    def to_features(params: Any, batch: Batch) -> Batch:
        if "features" in batch:  # computed once, before the run
            return batch
        rest = {name: value for name, value in batch.items() if name != "image"}
        return {**rest, "features": compute(params, {"image": batch["image"]})}

    return to_features


def _through_folded(gradient: Gradient) -> Gradient:
    """From the gradient for folded parameters that for the parameters: folded once, and pulled back once."""

    def compute(trainable: Any, *rest: Any) -> tuple[Any, dict[str, jax.Array]]:
        folded, pull_back = jax.vjp(folding.fold, trainable)
        grads, metrics = gradient(folded, *rest)
        return pull_back(grads)[0], metrics

    return compute


def _make_gradient(task: Task, mesh: Mesh, accum_steps: int, fold: bool) -> Gradient:
    """(trainable, frozen, batch, keys (B,)) -> the gradient of the mean loss and the metrics, of all devices."""
    shapes, _ = split_frozen(task.abstract_params, task.frozen)

    def loss_fn(trainable: Any, frozen: Any, batch: Batch, keys: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        if fold:
            trainable = folding.unfold(trainable, shapes)
        loss, metrics = task.loss({**trainable, **frozen}, batch, keys)
        metrics = {"loss": loss, **metrics}
        return loss.mean(), {name: _reduce(value) for name, value in metrics.items()}

    # Under jit of its own so that the shapes of the sums and the loop over pieces take one trace, which takes seconds.
    grad_fn = jax.jit(jax.grad(loss_fn, has_aux=True), inline=True)

    def accumulated(trainable: Any, frozen: Any, batch: Batch, keys: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        """The sums of gradients and metrics over `accum_steps` microbatches, one at a time in memory."""

        def add(total: Any, micro: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, grad_fn(trainable, frozen, *micro)), None

        micros = _split_microbatches((batch, keys), accum_steps, task.rows_together)
        sums = jax.eval_shape(grad_fn, trainable, frozen, *jax.tree.map(lambda x: x[0], micros))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums)
        return jax.lax.scan(add, zeros, micros)[0]

    if task.statistics is not None:
        return grad_fn  # of features, all at once: over how many devices is the compiler's business
    compute, shares = accumulated if accum_steps > 1 else grad_fn, accum_steps
    if fold:
        compute = _through_folded(compute)
    if is_data_parallel(mesh):
        compute = on_each_device(compute, mesh, num_whole=2, combine=jax.lax.psum)
        shares *= mesh.size
    return lambda *args: _divide(compute(*args), shares)  # once, in the operations that take the gradient


def make_train_step(
    task: Task,
    tx: optax.GradientTransformationExtraArgs,
    hyperparams: Hyperparams,
    *,
    mesh: Mesh,
    shardings: TrainState,
    global_batch_size: int,
    accum_steps: int,
    ema_decay: float,
    fold: bool,
) -> TrainStep:
    """Returns the update of a run, which compiles on first call; no number of `hyperparams` is part of the program.

    With `fold` gradients are computed with folded parameters (`cpu/folding.py`).

    Every example has its own key, derived from (seed, step, row): masks and dropout do not depend on the number of
    devices or on accumulation. Metrics are float32 or int32 scalars on the device: loss, further means of the task,
    lr, grad_norm (before clipping), param_norm, skipped_steps (in all) and skipped_run (in a row).
    """

    gradient = _make_gradient(task, mesh, accum_steps, fold)
    to_features = _make_to_features(task, mesh, accum_steps)

    def train_step(
        state: TrainState, batch: Batch, hyperparams: Hyperparams
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        step_key = jax.random.fold_in(jax.random.key(hyperparams.seed), state.step)
        keys = jax.random.split(step_key, global_batch_size)
        keys = jax.lax.with_sharding_constraint(keys, batch_sharding(mesh))  # (B,)
        trainable, frozen = split_frozen(state.params, task.frozen)
        if task.statistics is not None:
            batch = to_features(state.params, batch)
        grads, metrics = gradient(trainable, frozen, batch, keys)
        lr = hyperparams.learning_rate(state.step)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its counters with floats
            updates, opt_state = tx.update(grads, state.opt_state, trainable, learning_rate=lr)
        trainable: Any = optax.apply_updates(trainable, updates)
        skipped_run, skipped_steps = nonfinite_counts(opt_state)
        keep = functools.partial(jnp.where, skipped_run > 0)  # what there was, if this update is skipped
        if task.statistics is not None:
            new = task.statistics(state.params, batch)
            frozen = {**frozen, **jax.tree.map(keep, {name: frozen[name] for name in new}, new)}
        metrics = {
            **metrics,
            "lr": lr,
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(trainable),
            "skipped_steps": skipped_steps,
            "skipped_run": skipped_run,
        }
        ema = state.ema
        if ema is not None:
            ema = jax.tree.map(keep, ema, _average(ema, trainable, state.step, ema_decay))
        return TrainState(step=state.step + 1, params={**trainable, **frozen}, opt_state=opt_state, ema=ema), metrics

    program = jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh), replicated(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=cores.options_to_train() if is_by_cores(mesh) else None,
    )
    return TrainStep(program, hyperparams, mesh)
