"""Sums over the devices of a data-parallel mesh of which each device keeps a part; for use under `shard_map`."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mae_dist.parallel.mesh import num_slices
from mae_dist.parallel.rules import STATE_AXIS
from mae_dist.parallel.shardings import state_dimension, sum_over_devices


def sum_into_shards(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Sums an array over all devices and leaves each its part of the sum, as `sharding` splits it over `STATE_AXIS`.

    Of several TPU slices the sum within a slice comes first, so that only a part of it crosses their slow network.
    """
    dimension = state_dimension(sharding)
    if dimension is None:
        return sum_over_devices(x)
    mesh = sharding.mesh
    assert isinstance(mesh, Mesh)
    slices, count = num_slices(mesh.devices.flat), mesh.shape[STATE_AXIS]
    if slices == 1:
        return jax.lax.psum_scatter(x, STATE_AXIS, scatter_dimension=dimension, tiled=True)
    places = np.arange(count).reshape(slices, -1)  # the slices are the outermost along the axis
    before, size, after = x.shape[:dimension], x.shape[dimension], x.shape[dimension + 1 :]
    # A stage takes parts of the parts of the one before it, so those of the slices must be the innermost. One axis is
    # behind them: of an array with heads (…, 3, H, hd) libtpu's compiler would make the whole sum.
    parts = x.reshape(*before, slices, count // slices, size // count, -1).swapaxes(dimension, dimension + 1)
    total = parts.reshape(*before, size, -1)
    for groups in (places.tolist(), places.T.tolist()):
        total = jax.lax.psum_scatter(
            total, STATE_AXIS, scatter_dimension=dimension, axis_index_groups=groups, tiled=True
        )
    return total.reshape(*before, size // count, *after)
