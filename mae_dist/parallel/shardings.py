"""Shardings of parameters, optimizer state, batches and activations on the mesh.

The table of parameters names the logical axes of each, `MESH_AXES` the mesh axes of a logical axis. Models know logical
axes at most. Optimizer state follows its parameter.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mae_dist.errors import ConfigError
from mae_dist.model.parameters import LogicalAxes, Parameter, parameter_rows
from mae_dist.parallel.rules import MESH_AXES, to_spec


def _axis_size(mesh: Any, entry: str | tuple[str, ...] | None) -> int:
    names = (entry,) if isinstance(entry, str) else entry or ()
    return math.prod(mesh.shape[name] for name in names)


def param_shardings(mesh: Mesh, params: Any) -> Any:
    """A NamedSharding for every parameter; `ConfigError` where a split dimension is not divisible by its mesh axis."""

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


def opt_state_shardings(mesh: Mesh, tx: optax.GradientTransformation, opt_state: Any, shardings: Any) -> Any:
    """Each moment like its parameter (`shardings`, a tree like the trainable parameters); counters whole everywhere."""
    replicated = NamedSharding(mesh, PartitionSpec())
    return optax.tree.map_params(
        tx, lambda _, sharding: sharding, opt_state, shardings, transform_non_params=lambda _: replicated
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples over data x fsdp, everything else of a batch whole."""
    return NamedSharding(mesh, to_spec(("batch",), "batch"))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts host arrays whole on every device of the mesh; each process gives the same ones."""
    sharding = replicated(mesh)

    def place(value: Any) -> jax.Array:
        host = np.asarray(value)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(place, tree)


def num_batch_shards(mesh: Any) -> int:
    """Into how many parts the examples of a batch are split."""
    return _axis_size(mesh, MESH_AXES["batch"])


def is_data_parallel(mesh: Mesh) -> bool:
    """Whether every device holds the whole model and only examples are split."""
    return mesh.shape["fsdp"] == mesh.shape["tensor"] == 1


def is_by_cores(mesh: Mesh) -> bool:
    """Whether the devices are a CPU's and share nothing but examples: each can compute in the way that suits a core."""
    return mesh.devices.flat[0].platform == "cpu" and is_data_parallel(mesh)


def on_each_device(
    fn: Callable[..., Any], mesh: Mesh, num_whole: int, combine: Callable[[Any, Any], Any] | None
) -> Callable[..., Any]:
    """Runs `fn` on each device for its own examples; for a data-parallel mesh.

    What is combined is exchanged once at the end, whatever loop `fn` runs: left to itself the compiler would exchange
    in every round of it.

    Args:
      fn: takes `num_whole` arguments that are whole on every device, then one or more split over examples.
      mesh: data-parallel.
      num_whole: how many of the arguments are whole.
      combine: (results, mesh axes) -> results of all, as `jax.lax.psum`; None leaves the results split over examples.
    """
    whole, split = PartitionSpec(), batch_sharding(mesh).spec

    def local(*args: Any) -> Any:
        return combine(fn(*args), MESH_AXES["batch"]) if combine else fn(*args)

    def call(*args: Any) -> Any:
        specs = tuple(whole if i < num_whole else split for i in range(len(args)))
        # Nothing is said of replication inside: gradients taken there are of local examples only.
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=whole if combine else split, check_vma=False)(
            *args
        )

    return call


def make_constrain(mesh: Mesh) -> Any:
    """The hook (array, logical axes) -> array by which a model pins activations without knowing the mesh."""
    if is_data_parallel(mesh):
        return lambda x, axes: x  # the batch is split from the start and nothing else is

    def constrain(x: jax.Array, axes: LogicalAxes) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, to_spec(axes, "activation")))

    return constrain


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Shapes (a tree of them) that say where the arrays lie."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
    )


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Bytes one device holds of `tree` (arrays or shapes) laid out by `shardings`."""
    sizes = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize, tree, shardings
    )
    return sum(jax.tree.leaves(sizes))
