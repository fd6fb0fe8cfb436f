"""The compiled training step: a pure function of (state, batch, hyperparams), sharded, the state donated."""

import collections
import dataclasses
import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from mae_dist.cpu import cores
from mae_dist.optim.hyperparams import Hyperparams
from mae_dist.optim.optimizer import nonfinite_counts
from mae_dist.optim.train_state import TrainState, split_frozen
from mae_dist.parallel.shardings import (
    batch_sharding,
    is_by_cores,
    replicate,
    replicated,
)
from mae_dist.tasks.base import Batch, Task
from mae_dist.training.gradient import make_gather, make_gradient, make_to_features

# Steps on their way to the devices, each of which holds a batch there. XLA takes 32 programs for a CPU device; one more
# waits in a thread that an exchange may need, for ever where devices are as many as cores (jaxlib 0.10.2).
_MAX_AHEAD = 8


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """The training step of one run: (TrainState, Batch) -> (TrainState, dict of scalars), the old state donated.

    A call does not wait for its result, but for that of a call some steps before it.

    program: (state, batch, hyperparams) -> (state, metrics), which compiles on its first call or was compiled ahead.
    hyperparams: the last argument, by which this run differs from others with the same program.
    mesh: the devices it runs on.
    compiler_options: those of `program` besides XLA's defaults and flags.
    """

    program: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    hyperparams: Hyperparams
    mesh: Mesh
    compiler_options: dict[str, Any] | None = None
    _ahead: collections.deque[jax.Array] = dataclasses.field(
        default_factory=collections.deque, init=False, repr=False, compare=False
    )

    @functools.cached_property
    def _placed(self) -> Hyperparams:
        """Puts the hyperparameters on the devices, once."""
        return replicate(self.hyperparams, self.mesh)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        if len(self._ahead) == _MAX_AHEAD:
            jax.block_until_ready(self._ahead.popleft())
        state, metrics = self.program(state, batch, self._placed)
        self._ahead.append(metrics["skipped_run"])
        return state, metrics

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


def _average(ema: PyTree, new: PyTree, step: jax.Array, decay: float) -> PyTree:
    """Returns the exponential moving average of parameters after step `step` (from 0), which made them `new`.

    The decay is at most (1 + step) / (10 + step): with the full decay the initial weights would dominate early on.
    """
    done = step.astype(jnp.float32)
    rate = 1 - jnp.minimum(decay, (1 + done) / (10 + done))
    return jax.tree.map(lambda average, value: average + rate * (value - average), ema, new)


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
    gather = make_gather(task, mesh, jnp.float32 if fold else jnp.dtype(dtype))
    gradient = make_gradient(task, mesh, held, accum_steps, fold, grad_exchange)
    to_features = make_to_features(task, mesh, accum_steps)

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
