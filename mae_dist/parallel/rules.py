"""The one table of sharding rules: parameter paths to logical axes, logical axes to mesh axes."""

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

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
