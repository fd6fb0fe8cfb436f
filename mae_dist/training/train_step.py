"""The compiled training step: a pure function of (state, batch, hyperparams), sharded, the state donated."""

import dataclasses
import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Num, PyTree, Shaped

from mae_dist.cpu import cores, folding
from mae_dist.model.build import Params
from mae_dist.model.parameters import parameter_rows
from mae_dist.optim.hyperparams import Hyperparams
from mae_dist.optim.optimizer import nonfinite_counts
from mae_dist.optim.train_state import TrainState, split_frozen
from mae_dist.parallel.scatter import sum_into_shards
from mae_dist.parallel.shardings import (
    batch_sharding,
    is_by_cores,
    is_data_parallel,
    on_each_device,
    param_shardings,
    replicate,
    replicated,
    sum_over_devices,
)
from mae_dist.tasks.base import Batch, Task

Gradient = Callable[..., tuple[PyTree, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """The training step of one run: (TrainState, Batch) -> (TrainState, dict of scalars), the old state donated.

    program: (state, batch, hyperparams) -> (state, metrics), which compiles on its first call or was compiled ahead.
    hyperparams: the last argument, by which this run differs from others with the same program.
    mesh: the devices it runs on.
    compiler_options: those of `program` besides XLA's defaults and flags.
    """

    program: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    hyperparams: Hyperparams
    mesh: Mesh
    compiler_options: dict[str, Any] | None = None

    @functools.cached_property
    def _placed(self) -> Hyperparams:
        """Puts the hyperparameters on the devices, once."""
        return replicate(self.hyperparams, self.mesh)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        return self.program(state, batch, self._placed)

    def trace(self, state: TrainState, batch: PyTree) -> jax.stages.Traced:
        """Traces the program for arguments like these; their shapes and shardings suffice."""
        assert isinstance(self.program, jax.stages.Wrapped), "compiled ahead"
        return self.program.trace(state, batch, self.hyperparams)

    def lower(self, state: TrainState, batch: PyTree) -> jax.stages.Lowered:
        """Lowers the program for arguments like these."""
        return self.trace(state, batch).lower()

    def compiled(self, lowered: jax.stages.Lowered, **options: Any) -> "TrainStep":
        """Returns the same step with `lowered` compiled; `options` go to its `compile`."""
        return dataclasses.replace(self, program=lowered.compile(**options))

    def compile_in_thread(
        self,
        state: TrainState,
        batch: PyTree,
        load: Callable[[jax.stages.Lowered], jax.stages.Compiled | None] = lambda lowered: None,
    ) -> "Future[TrainStep]":
        """Traces the program here, and compiles it in a daemon thread, for which no early end of the process waits.

        `load`, called there, may return it compiled already.
        """
        lowered = self.lower(state, batch)
        compiled: Future[TrainStep] = Future()

        def compile_lowered() -> None:
            try:
                loaded = load(lowered)
                step = dataclasses.replace(self, program=loaded) if loaded else self.compiled(lowered)
                compiled.set_result(step)
            except Exception as error:  # raised where the result is asked for
                compiled.set_exception(error)

        threading.Thread(target=compile_lowered, daemon=True).start()
        return compiled


def _split_microbatches(batch: PyTree, accum_steps: int, rows_together: int) -> PyTree:
    """Splits (B, ...) into (A, B / A, ...) by every A-th row, so that each device splits its own rows and none move.

    Where rows must stay together (`Task.rows_together`) it takes every A-th group of them.
    """

    def split(x: Shaped[Array, "B *rest"]) -> Shaped[Array, "A B_A *rest"]:
        rest = x.shape[1:]
        groups = x.reshape(x.shape[0] // (accum_steps * rows_together), accum_steps, rows_together, *rest)
        return jnp.moveaxis(groups, 1, 0).reshape(accum_steps, x.shape[0] // accum_steps, *rest)

    return jax.tree.map(split, batch)


def _join_microbatches(x: Shaped[Array, "A B_A *rest"], rows_together: int) -> Shaped[Array, "B *rest"]:
    """Inverts `_split_microbatches` for one array."""
    count, rest = x.shape[0], x.shape[2:]
    groups = x.reshape(count, -1, rows_together, *rest)
    return jnp.moveaxis(groups, 0, 1).reshape(-1, *rest)


def _is_integer(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.integer)


def _reduce(x: Num[Array, "B"]) -> Num[Array, ""]:
    """Returns the mean of a per-example metric, or the sum if it is an integer."""
    return x.sum(dtype=x.dtype) if _is_integer(x) else x.mean()


def _divide(sums: PyTree, count: int) -> PyTree:
    """Divides sums over `count` equal parts of a batch into means; integers stay sums."""
    return sums if count == 1 else jax.tree.map(lambda x: x if _is_integer(x) else x / count, sums)


def _average(ema: PyTree, new: PyTree, step: jax.Array, decay: float) -> PyTree:
    """Returns the exponential moving average of parameters after step `step` (from 0), which made them `new`.

    The decay is at most (1 + step) / (10 + step): with the full decay the initial weights would dominate early on.
    """
    done = step.astype(jnp.float32)
    rate = 1 - jnp.minimum(decay, (1 + done) / (10 + done))
    return jax.tree.map(lambda average, value: average + rate * (value - average), ema, new)


def _make_to_features(task: Task, mesh: Mesh, accum_steps: int) -> Callable[[Params, Batch], Batch]:
    """Makes (params, batch) -> batch that replaces images by the frozen encoder's features, in microbatches."""

    def compute(params: Params, images: Batch) -> jax.Array:
        assert task.features is not None
        split = _split_microbatches(images, accum_steps, task.rows_together)
        return _join_microbatches(jax.lax.map(functools.partial(task.features, params), split), task.rows_together)

    if is_data_parallel(mesh):
        compute = on_each_device(compute, mesh, num_whole=1, combine=None)

    def to_features(params: Params, batch: Batch) -> Batch:
        if "features" in batch:  # computed once before the run
            return batch
        rest = {name: value for name, value in batch.items() if name != "image"}
        return {**rest, "features": compute(params, {"image": batch["image"]})}

    return to_features


def _through_folded(gradient: Gradient) -> Gradient:
    """Makes the gradient for parameters from that for folded ones: folds once and pulls back once per step."""

    def compute(trainable: Params, *rest: PyTree) -> tuple[PyTree, dict[str, jax.Array]]:
        folded, pull_back = jax.vjp(folding.fold, trainable)
        grads, metrics = gradient(folded, *rest)
        return pull_back(grads)[0], metrics

    return compute


def _make_gather(task: Task, mesh: Mesh, dtype: Any) -> Callable[[Params], Params]:
    """Makes trainable, split over the data axis -> the parameters that the forward and backward passes take.

    They are gathered in `dtype`, but for those that the model computes with in float32.
    """
    shapes, _ = split_frozen(task.abstract_params, task.frozen)
    rows, whole = parameter_rows(shapes), param_shardings(mesh, shapes)

    def gather(trainable: Params) -> Params:
        cast = jax.tree.map(lambda x, row: x if row.is_float32 else x.astype(dtype), trainable, rows)
        return jax.lax.with_sharding_constraint(cast, whole)

    return gather


def make_exchange(shardings: PyTree, dtype: Any) -> Callable[[tuple[PyTree, Any]], tuple[PyTree, Any]]:
    """Makes (gradients, metrics) of one device -> those of all, for `on_each_device`.

    Gradients are summed in `dtype`, and each device keeps the part whose parameters it updates.
    """

    def exchange(results: tuple[PyTree, Any]) -> tuple[PyTree, Any]:
        grads, metrics = results
        sums = jax.tree.map(lambda g, sharding: sum_into_shards(g.astype(dtype), sharding), grads, shardings)
        return jax.tree.map(lambda g: g.astype(jnp.float32), sums), sum_over_devices(metrics)

    return exchange


def _make_gradient(
    task: Task, mesh: Mesh, shardings: PyTree, accum_steps: int, fold: bool, grad_exchange: str
) -> Gradient:
    """Makes (trainable, frozen, batch, keys (B,)) -> (gradient of the mean loss, metrics), over all devices.

    The trainable parameters are whole along the data axis and may be in the type of matmuls. Gradients are float32, and
    sharded as `shardings`, those of the parameters that the optimizer updates.
    """
    shapes, _ = split_frozen(task.abstract_params, task.frozen)

    def loss_fn(
        trainable: Params, frozen: Params, batch: Batch, keys: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        if fold:
            trainable = folding.unfold(trainable, shapes)
        loss, metrics = task.loss({**trainable, **frozen}, batch, keys)
        metrics = {"loss": loss, **metrics}
        return loss.mean(), {name: _reduce(value) for name, value in metrics.items()}

    def gradient(*args: PyTree) -> tuple[PyTree, dict[str, jax.Array]]:
        grads, metrics = jax.grad(loss_fn, has_aux=True)(*args)
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), metrics

    # With a jit of its own it is traced once for `eval_shape` and the scan below; a trace takes seconds.
    grad_fn = jax.jit(gradient, inline=True)

    def accumulated(
        trainable: Params, frozen: Params, batch: Batch, keys: jax.Array
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """Sums gradients and metrics over `accum_steps` microbatches, one at a time in memory."""

        def add(total: PyTree, micro: PyTree) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, grad_fn(trainable, frozen, *micro)), None

        micros = _split_microbatches((batch, keys), accum_steps, task.rows_together)
        sums = jax.eval_shape(grad_fn, trainable, frozen, *jax.tree.map(lambda x: x[0], micros))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums)
        return jax.lax.scan(add, zeros, micros)[0]

    compute, num_parts = accumulated if accum_steps > 1 else grad_fn, accum_steps
    if task.statistics is not None:
        compute, num_parts = grad_fn, 1  # of features of the whole batch; XLA shards it
    elif fold:
        compute = _through_folded(compute)
    if is_data_parallel(mesh) and task.statistics is None:
        specs = jax.tree.map(lambda sharding: sharding.spec, shardings), PartitionSpec()
        exchange = make_exchange(shardings, jnp.dtype(grad_exchange))
        compute = on_each_device(compute, mesh, num_whole=2, combine=exchange, combined=specs)
        num_parts *= mesh.size

    def mean(*args: PyTree) -> tuple[PyTree, dict[str, jax.Array]]:
        grads, metrics = _divide(compute(*args), num_parts)  # fused into the operations that use the gradient
        return jax.lax.with_sharding_constraint(grads, shardings), metrics

    return mean


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
    dtype: str,
    shard_state: bool,
    grad_exchange: str,
) -> TrainStep:
    """Returns the training step, which compiles on its first call; `hyperparams` are arguments of it, not constants.

    With `fold` gradients are computed with folded parameters (`cpu/folding.py`). `dtype` is that of the model's
    matmuls; `shard_state` and `grad_exchange` are fields of `config.optim`.

    Every example has its own key, derived from (seed, step, row), so masks and dropout do not depend on the number of
    devices or on accumulation. Metrics are float32 or int32 scalars on the device: loss, further metrics of the task,
    lr, grad_norm (before clipping), param_norm, skipped_steps (in total) and skipped_run (in a row).
    """

    held, _ = split_frozen(shardings.params, task.frozen)
    gather = _make_gather(task, mesh, jnp.float32 if fold else jnp.dtype(dtype))
    gradient = _make_gradient(task, mesh, held, accum_steps, fold, grad_exchange)
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
        grads, metrics = gradient(gather(trainable) if shard_state else trainable, frozen, batch, keys)
        lr = hyperparams.learning_rate(state.step)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its counters with floats
            updates, opt_state = tx.update(grads, state.opt_state, trainable, learning_rate=lr)
        trainable: Any = optax.apply_updates(trainable, updates)
        skipped_run, skipped_steps = nonfinite_counts(opt_state)
        keep = functools.partial(jnp.where, skipped_run > 0)  # the old values if this step is skipped
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

    options = cores.options_to_train() if is_by_cores(mesh) else None
    program = jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh), replicated(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=options,
    )
    return TrainStep(program, hyperparams, mesh, options)
