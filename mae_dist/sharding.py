"""The mesh, the one table of sharding rules, and the overview of what lies where.

A parameter's path names its logical axes (`RULES`), a logical axis names mesh axes (`MESH_AXES`). Models know logical
axes at most. Optimizer state follows its parameter.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from clu import parameter_overview
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mae_dist.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
LogicalAxes = tuple[str | None, ...]

# Logical axis -> mesh axes. `layers` (the stack of blocks) and `patches` are never split.
MESH_AXES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "patches": None,
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
}

# Parameter path -> logical axes. A path matches exactly one row; vectors of the model width stay whole: an all-gather
# would cost more than they weigh.
RULES: tuple[tuple[str, LogicalAxes], ...] = (
    (r"encoder/patch_embed/kernel", (None, "embed")),
    (r"encoder/patch_embed/bias", (None,)),
    (r"encoder/cls_token", (None, None, None)),
    (r"(encoder|decoder)/positions/embedding", (None, "embed")),
    (r"(encoder|decoder)/stack/blocks/attn/qkv/kernel", ("layers", "embed", None, "heads", None)),
    (r"(encoder|decoder)/stack/blocks/attn/qkv/bias", ("layers", None, "heads", None)),
    (r"(encoder|decoder)/stack/blocks/attn/out/kernel", ("layers", "heads", None, "embed")),
    (r"(encoder|decoder)/stack/blocks/attn/out/bias", ("layers", None)),
    (r"(encoder|decoder)/stack/blocks/mlp/fc1/kernel", ("layers", "embed", "mlp")),
    (r"(encoder|decoder)/stack/blocks/mlp/fc1/bias", ("layers", "mlp")),
    (r"(encoder|decoder)/stack/blocks/mlp/fc2/kernel", ("layers", "mlp", "embed")),
    (r"(encoder|decoder)/stack/blocks/mlp/fc2/bias", ("layers", None)),
    (r"(encoder|decoder)/stack/blocks/(norm[12]/(scale|bias)|scale[12])", ("layers", None)),
    (r"(encoder|decoder)/norm/(scale|bias)", (None,)),
    (r"decoder/embed/kernel", (None, "embed")),
    (r"decoder/embed/bias", (None,)),
    (r"decoder/mask_token", (None, None, None)),
    (r"decoder/pred/kernel", ("embed", None)),
    (r"decoder/pred/bias", (None,)),
    (r"batch_norm/(mean|var)", (None,)),
    (r"head/norm/(scale|bias)", (None,)),
    (r"head/hidden/kernel", ("embed", "mlp")),
    (r"head/hidden/bias", ("mlp",)),
    (r"head/linear/kernel", ("embed", None)),
    (r"head/linear/bias", (None,)),
)


def mesh_shape(sizes: dict[str, int], num_devices: int) -> tuple[int, ...]:
    """Sizes of (data, fsdp, tensor) over `num_devices`; one of them may be -1 and takes what is left."""
    shape = [sizes[axis] for axis in AXES]
    named = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise ConfigError(f"{named}: sizes are positive and at most one may be -1 (what is left)")
    fixed = math.prod(size for size in shape if size != -1)
    if -1 in shape:
        if num_devices % fixed:
            raise ConfigError(
                f"{named}: the fixed sizes multiply to {fixed}, which does not divide {num_devices} devices; "
                f"choose sizes whose product divides {num_devices}"
            )
        shape[shape.index(-1)] = num_devices // fixed
    elif fixed != num_devices:
        raise ConfigError(
            f"{named} needs {fixed} devices and there are {num_devices}; set one of them to -1, or make the product "
            f"{num_devices}"
        )
    return tuple(shape)


def make_mesh(sizes: dict[str, int], devices: Sequence[Any]) -> Mesh:
    """A mesh over `devices` (real or abstract) with the axes data, fsdp and tensor; `data` spans the TPU slices."""
    return Mesh(mesh_devices(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_devices(sizes: dict[str, int], devices: Sequence[Any]) -> np.ndarray:
    """`devices` in their places (data, fsdp, tensor), neighbours of the mesh close to each other.

    Where TPU devices belong to several slices, `data` spans the slices and the other axes stay within one: the network
    between slices is far slower than that within. GPUs need nothing: their order alone keeps `data` outermost.
    """
    shape, slices = mesh_shape(sizes, len(devices)), num_slices(devices)
    if slices == 1:
        split = devices[0].platform == "tpu"  # a mesh axis may lie along part of a side of the slice
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=split)
    within = (_data_within_slice(shape, slices), *shape[1:])
    return mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True)


def num_slices(devices: Iterable[Any]) -> int:
    """How many TPU slices the devices belong to; 1 for anything but TPUs."""
    return max(1, len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}))


def _data_within_slice(shape: tuple[int, ...], slices: int) -> int:
    """The share of mesh axis `data` that lies in one slice."""
    data, each = shape[0], math.prod(shape) // slices
    if data % slices:
        raise ConfigError(
            f"mesh.data={data} is not a multiple of the {slices} slices, which it must span: mesh.fsdp x mesh.tensor "
            f"is {math.prod(shape[1:])} and a slice has {each} devices; make it a divisor of {each}"
        )
    return data // slices


def to_spec(axes: LogicalAxes, what: str) -> PartitionSpec:
    """Logical axes of one array -> PartitionSpec; two axes on one mesh axis are an error that names both."""
    entries, taken = [], {}
    for axis in axes:
        mesh_axes = MESH_AXES[axis] if axis is not None else None
        for mesh_axis in (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ():
            if mesh_axis in taken:
                raise ValueError(
                    f"{what}: logical axes {taken[mesh_axis]!r} and {axis!r} both map to mesh axis {mesh_axis!r}; "
                    "change its row in sharding.RULES or sharding.MESH_AXES"
                )
            taken[mesh_axis] = axis
        entries.append(mesh_axes)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def path_name(path: Any) -> str:
    """A key path of a parameter tree as `encoder/stack/blocks/…`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def logical_axes(params: Any, rules: Sequence[tuple[str, LogicalAxes]] = RULES) -> Any:
    """The logical axes of every parameter, a tree of tuples like `params` (arrays or shapes)."""

    def match(path: Any, leaf: Any) -> LogicalAxes:
        name = path_name(path)
        rows = [(pattern, axes) for pattern, axes in rules if re.fullmatch(pattern, name)]
        if len(rows) != 1:
            raise ValueError(
                f"parameter {name} {leaf.shape} matches {len(rows)} rows of sharding.RULES, needed: 1. {rows}"
            )
        pattern, axes = rows[0]
        if len(axes) != len(leaf.shape):
            raise ValueError(
                f"parameter {name} has shape {leaf.shape} and its row {pattern!r} names {len(axes)} axes: {axes}"
            )
        return axes

    return jax.tree_util.tree_map_with_path(match, params)


def _axis_size(mesh: Any, entry: str | tuple[str, ...] | None) -> int:
    names = (entry,) if isinstance(entry, str) else entry or ()
    return math.prod(mesh.shape[name] for name in names)


def param_shardings(mesh: Mesh, params: Any) -> Any:
    """A NamedSharding for every parameter; `ConfigError` where a split dimension is not divisible by its mesh axis."""

    def shard(path: Any, leaf: Any, axes: LogicalAxes) -> NamedSharding:
        name = path_name(path)
        spec = to_spec(axes, name)
        for axis, size, entry in zip(axes, leaf.shape, spec, strict=False):
            if size % _axis_size(mesh, entry):
                raise ConfigError(
                    f"{name} {leaf.shape}: its {axis!r} dimension {size} does not divide by "
                    f"mesh.{entry}={_axis_size(mesh, entry)}; choose a mesh.{entry} that divides {size}, "
                    "or change the model's width, heads or MLP ratio"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(shard, params, logical_axes(params))


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


@dataclasses.dataclass
class _Row:
    parameter: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    bytes_per_device: int


def placed(abstract: Any, shardings: Any) -> Any:
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


def overview(mesh: Mesh, state: Any, shardings: Any) -> str:
    """A readable table: mesh, every parameter with its spec and bytes per device, totals, and what is whole and why.

    Args:
      mesh: the mesh.
      state: a TrainState of arrays or shapes.
      shardings: the same tree of NamedShardings.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    specs = jax.tree.leaves(shardings.params)
    axes = jax.tree.leaves(logical_axes(state.params), is_leaf=lambda x: isinstance(x, tuple))
    rows, whole = [], {}
    for (path, leaf), sharding, names in zip(leaves, specs, axes, strict=True):
        spec = ", ".join(
            str(entry) if entry else "-" for entry in (*sharding.spec, *[None] * len(leaf.shape))[: len(leaf.shape)]
        )
        rows.append(_Row(path_name(path), leaf.shape, leaf.dtype.name, spec, bytes_per_device(leaf, sharding)))
        if mesh.size > 1 and sharding.shard_shape(leaf.shape) == leaf.shape:
            mapped = sorted({str(MESH_AXES[name]) for name in names if name and MESH_AXES[name]})
            why = f"mesh axis {' and '.join(mapped)} has size 1" if mapped else "small: its rule leaves it whole"
            whole.setdefault(why, []).append((path_name(path), leaf))
    total = sum(math.prod(leaf.shape) for _, leaf in leaves)
    slices = num_slices(mesh.devices.flat)
    lines = [
        "mesh: "
        + " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        + f" ({mesh.size} devices{f'; {slices} slices, data across them' if slices > 1 else ''})",
        parameter_overview.make_table(rows),
        f"parameters: {total:,} in {len(rows)} arrays, {bytes_per_device(state.params, shardings.params):,} bytes per "
        f"device; optimizer state: {bytes_per_device(state.opt_state, shardings.opt_state):,} bytes per device",
    ]
    if state.ema is not None:
        lines.append(f"averages of the parameters: {bytes_per_device(state.ema, shardings.ema):,} bytes per device")
    for why, entries in whole.items():
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for _, leaf in entries)
        lines.append(f"whole on every device, {why}: {len(entries)} arrays, {size:,} bytes")
    return "\n".join(lines)
