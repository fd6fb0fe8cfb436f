"""A readable table of what lies where."""

import dataclasses
import math

import jax
from clu import parameter_overview
from jax.sharding import Mesh
from jaxtyping import PyTree

from mae_dist.model.parameters import parameter_rows
from mae_dist.parallel.mesh import num_slices
from mae_dist.parallel.rules import MESH_AXES
from mae_dist.parallel.shardings import bytes_per_device, state_dimension


@dataclasses.dataclass
class _Row:
    parameter: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    bytes_per_device: int


def describe_mesh(mesh: Mesh) -> str:
    """Returns the sizes of a mesh's axes in one line."""
    slices = num_slices(mesh.devices.flat)
    sizes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    return f"{sizes}, data across {slices} slices" if slices > 1 else sizes


def count_parameters(params: PyTree) -> int:
    """Returns how many numbers the parameters are."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def overview(mesh: Mesh, state: PyTree, shardings: PyTree) -> str:
    """Returns a table: mesh, every parameter with its spec and bytes per device, totals, what is replicated and why.

    If state is sharded over the data axis too, it says which arrays are not.

    Args:
      mesh: the mesh.
      state: a TrainState of arrays or shapes.
      shardings: the same tree of NamedShardings.
    """
    leaves = jax.tree.leaves(state.params)
    specs = jax.tree.leaves(shardings.params)
    parameters = jax.tree.leaves(parameter_rows(state.params))
    rows, whole = [], {}
    for leaf, sharding, parameter in zip(leaves, specs, parameters, strict=True):
        spec = ", ".join(
            str(entry) if entry else "-" for entry in (*sharding.spec, *[None] * len(leaf.shape))[: len(leaf.shape)]
        )
        rows.append(_Row(parameter.path, leaf.shape, leaf.dtype.name, spec, bytes_per_device(leaf, sharding)))
        if mesh.size > 1 and sharding.shard_shape(leaf.shape) == leaf.shape:
            mapped = sorted({str(MESH_AXES[name]) for name in parameter.axes if name and MESH_AXES[name]})
            why = f"mesh axis {' and '.join(mapped)} has size 1" if mapped else "small: its rule leaves it whole"
            whole.setdefault(why, []).append(leaf)
    in_memory = bytes_per_device(state.params, shardings.params)
    lines = [
        f"mesh: {describe_mesh(mesh)} ({mesh.size} devices)",
        parameter_overview.make_table(rows),
        f"parameters: {count_parameters(state.params):,} in {len(rows)} arrays, {in_memory:,} bytes per device; "
        f"optimizer state: {bytes_per_device(state.opt_state, shardings.opt_state):,} bytes per device",
    ]
    if state.ema is not None:
        lines.append(f"averages of the parameters: {bytes_per_device(state.ema, shardings.ema):,} bytes per device")
    for why, entries in whole.items():
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in entries)
        lines.append(f"whole on every device, {why}: {len(entries)} arrays, {size:,} bytes")
    uneven = [row for row, sharding in zip(rows, specs, strict=True) if state_dimension(sharding) is None]
    if len(uneven) < len(rows):
        size = sum(row.bytes_per_device for row in uneven)
        lines.append(
            f"split over mesh.data={mesh.shape['data']} too (optim.shard_state) but for {len(uneven)} arrays, {size:,} "
            "bytes, which are frozen or have no dimension that divides"
        )
        lines += [f"  {row.parameter}" for row in uneven]
    return "\n".join(lines)
