"""The gradient of a step over all devices: microbatches, exchange, and the parameters that it is computed with."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Num, PyTree, Shaped

from mae_dist.cpu import folding
from mae_dist.model.build import Params
from mae_dist.model.parameters import parameter_rows
from mae_dist.optim.train_state import split_frozen
from mae_dist.parallel.scatter import sum_into_shards
from mae_dist.parallel.shardings import is_data_parallel, on_each_device, param_shardings, sum_over_devices
from mae_dist.tasks.base import Batch, Task

Gradient = Callable[..., tuple[PyTree, dict[str, jax.Array]]]


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


def make_to_features(task: Task, mesh: Mesh, accum_steps: int) -> Callable[[Params, Batch], Batch]:
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


def make_gather(task: Task, mesh: Mesh, dtype: Any) -> Callable[[Params], Params]:
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


def make_gradient(
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
