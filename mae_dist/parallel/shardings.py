"""Shardings of parameters, optimizer state, batches and activations on the mesh.

The table of parameters gives the logical axes of each parameter, `MESH_AXES` the mesh axes of each logical axis. Models
know logical axes only. Optimizer state is sharded like its parameter; `optim.shard_state` splits both over data too.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from mae_dist.errors import ConfigError
from mae_dist.model.parameters import LogicalAxes, Parameter, parameter_rows
from mae_dist.parallel.rules import MESH_AXES, STATE_AXIS, to_spec


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes of an entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else entry or ()


def _axis_size(mesh: Mesh | AbstractMesh, entry: str | tuple[str, ...] | None) -> int:
    return math.prod(mesh.shape[name] for name in _names(entry))


def param_shardings(mesh: Mesh, params: PyTree) -> PyTree:
    """Returns a NamedSharding per parameter; `ConfigError` if a mesh axis does not divide the dimension it shards."""

    def shard(leaf: Any, row: Parameter) -> NamedSharding:
        spec = to_spec(row.axes, row.path)
        for axis, size, entry in zip(row.axes, leaf.shape, spec, strict=False):
            if size % _axis_size(mesh, entry):
                raise ConfigError(
                    f"{row.path} {leaf.shape}: its {axis!r} dimension {size} does not divide by "
                    f"mesh.{entry}={_axis_size(mesh, entry)}; choose a mesh.{entry} that divides {size}, "
                    "or change the model's width, heads or MLP ratio"
                )
        return NamedSharding(mesh, spec)

    return jax.tree.map(shard, params, parameter_rows(params))


def split_state(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """Splits an array over `STATE_AXIS` too, along the first dimension that divides; returns `sharding` if none does.

    Args:
      sharding: how the array is split already; each of its parts is split again.
      shape: of the whole array.
    """
    mesh, count = sharding.mesh, sharding.mesh.shape[STATE_AXIS]
    entries = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    for dimension, size in enumerate(sharding.shard_shape(shape)):
        if count > 1 and size % count == 0:
            names = _names(entries[dimension])
            entries[dimension] = (*names, STATE_AXIS) if names else STATE_AXIS
            return NamedSharding(mesh, PartitionSpec(*entries[: max(dimension + 1, len(sharding.spec))]))
    return sharding


def state_dimension(sharding: NamedSharding) -> int | None:
    """Returns the dimension that `split_state` has split, or None."""
    return next((place for place, entry in enumerate(sharding.spec) if STATE_AXIS in _names(entry)), None)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: examples over data x fsdp."""
    return NamedSharding(mesh, to_spec(("batch",), "batch"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that puts a whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Puts whole host arrays on every device of the mesh; all processes pass the same arrays."""
    sharding = replicated(mesh)

    def place(value: jax.typing.ArrayLike) -> jax.Array:
        host = np.asarray(value)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(place, tree)


def num_batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Counts the parts into which the examples of a batch are split."""
    return _axis_size(mesh, MESH_AXES["batch"])


def is_data_parallel(mesh: Mesh) -> bool:
    """True if every device holds the whole model and only examples are split."""
    return mesh.shape["fsdp"] == mesh.shape["tensor"] == 1


def is_by_cores(mesh: Mesh) -> bool:
    """True if the devices are a CPU's cores and only examples are split: `cpu/` chooses how each computes."""
    return mesh.devices.flat[0].platform == "cpu" and is_data_parallel(mesh)


def on_each_device(
    fn: Callable[..., Any],
    mesh: Mesh,
    num_whole: int,
    combine: Callable[[Any], Any] | None,
    combined: PyTree = None,
) -> Callable[..., Any]:
    """Makes a function that runs `fn` on each device for its own examples, under `shard_map`.

    Devices exchange results once, at the end, whatever loop `fn` runs; under plain jit XLA would exchange them in every
    iteration.

    Args:
      fn: takes `num_whole` replicated arguments, then one or more that are split over examples.
      mesh: data-parallel.
      num_whole: the number of replicated arguments.
      combine: results of a device -> of all, such as `sum_over_devices`; None leaves them split over examples.
      combined: a tree of the PartitionSpecs in which `combine` leaves its results; None: they are whole.
    """
    whole, split = PartitionSpec(), batch_sharding(mesh).spec

    def local(*args: Any) -> Any:
        return combine(fn(*args)) if combine else fn(*args)

    def call(*args: Any) -> Any:
        specs = tuple(whole if i < num_whole else split for i in range(len(args)))
        # check_vma=False: gradients inside are of local examples only and must not be summed by shard_map.
        out = (combined or whole) if combine else split
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(*args)

    return call


def sum_over_devices(tree: PyTree) -> PyTree:
    """Sums arrays over all devices; for `combine` of `on_each_device`."""
    return jax.lax.psum(tree, MESH_AXES["batch"])


def make_constrain(mesh: Mesh) -> Callable[[jax.Array, LogicalAxes], jax.Array]:
    """Makes the hook (array, logical axes) -> array that constrains activations; models know no mesh."""
    if is_data_parallel(mesh):
        return lambda x, axes: x  # only the batch is sharded, and it is already

    def constrain(x: jax.Array, axes: LogicalAxes) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, to_spec(axes, "activation")))

    return constrain


def with_shardings(abstract: PyTree, shardings: PyTree) -> PyTree:
    """Returns a tree of shapes with their shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
    )


def bytes_per_device(tree: PyTree, shardings: PyTree) -> int:
    """Counts the bytes of `tree` (arrays or shapes) on one device under `shardings`."""
    sizes = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize, tree, shardings
    )
    return sum(jax.tree.leaves(sizes))
