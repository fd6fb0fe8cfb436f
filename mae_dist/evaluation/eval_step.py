"""Compiled steps of evaluations."""

import functools
from collections.abc import Callable

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from mae_dist.model.build import Params
from mae_dist.parallel.shardings import (
    batch_sharding,
    is_data_parallel,
    on_each_device,
    replicated,
    sum_over_devices,
)
from mae_dist.tasks.base import Batch


def make_eval_step(
    fn: Callable[[Params, Batch], PyTree],
    *,
    mesh: Mesh,
    params: PyTree,
    per_example: bool = False,
    pieces: int = 1,
) -> jax.stages.Wrapped:
    """Compiles (params, batch) -> outputs: whole on every device, or split over examples like the batch.

    Args:
      fn: (params, batch) -> arrays of one row per example, or else metrics whose fields are sums over examples.
      mesh: what it runs on.
      params: the shardings of the parameters it is given.
      per_example: True if `fn` returns one row per example.
      pieces: microbatches in which each device computes its examples one after another; needs a data-parallel mesh.
    """

    def in_pieces(params: Params, batch: Batch) -> PyTree:
        if pieces == 1:
            return fn(params, batch)
        split = jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), batch)
        out = jax.lax.map(functools.partial(fn, params), split)  # (pieces, ...)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]) if per_example else x.sum(axis=0), out)

    compute = in_pieces
    if is_data_parallel(mesh):
        compute = on_each_device(in_pieces, mesh, 1, combine=None if per_example else sum_over_devices)
    return jax.jit(
        compute,
        in_shardings=(params, batch_sharding(mesh)),
        out_shardings=batch_sharding(mesh) if per_example else replicated(mesh),
    )
