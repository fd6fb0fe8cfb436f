"""Sharding rules: logical axes to mesh axes. The logical axes of parameters are in `mae_dist.model.parameters`."""

from jax.sharding import PartitionSpec

from mae_dist.model.parameters import LogicalAxes

# Logical axis -> mesh axes. `layers` (the stack of blocks) and `patches` are never split.
MESH_AXES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "patches": None,
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
}
# With `optim.shard_state` what the optimizer updates is split over this axis too, along which there are copies of it
# otherwise (ZeRO-1; Rajbhandari et al. 2020).
STATE_AXIS = "data"


def to_spec(axes: LogicalAxes, what: str) -> PartitionSpec:
    """Returns the PartitionSpec of an array's logical axes; two of them on one mesh axis are an error."""
    entries, taken = [], {}
    for axis in axes:
        mesh_axes = MESH_AXES[axis] if axis is not None else None
        for mesh_axis in (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ():
            if mesh_axis in taken:
                raise ValueError(
                    f"{what}: logical axes {taken[mesh_axis]!r} and {axis!r} both map to mesh axis {mesh_axis!r}; "
                    "change its row in mae_dist/model/parameters.py, or MESH_AXES in mae_dist/parallel/rules.py"
                )
            taken[mesh_axis] = axis
        entries.append(mesh_axes)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)
