"""Renames and reshapes parameters from and to other implementations' layouts, by the table in `model/parameters.py`.

`timm` is the layout of timm's vision transformers, which the paper's own code extends by a decoder; `hf` that of
`transformers`. Nothing is read or written here: tensors are NumPy arrays by name, ours a nested dict.

Shapes: D width, H heads, hd = D / H, M MLP width, L patches, C channels, (ph, pw) patch.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from ml_collections import ConfigDict

from mae_dist.errors import DataFault
from mae_dist.model import layers, patches, positions
from mae_dist.model.parameters import PARAMETERS, Parameter, parameter_rows

# To which tables of fixed positions may have been rounded on their way here.
_ROUNDINGS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
Tensors = dict[str, np.ndarray]
Params = dict[str, Any]


def groups_in(tensors: Mapping[str, np.ndarray], layout: str) -> tuple[str, ...]:
    """Returns which of encoder, decoder and head the (standard) names belong to, in this order."""
    prefixes = {
        "hf": {"decoder": ("decoder.",), "head": ("classifier.",)},
        "timm": {"decoder": ("decoder_", "mask_token"), "head": ("head.", "fc_norm.")},
    }[layout]
    return ("encoder", *(group for group, starts in prefixes.items() if any(n.startswith(starts) for n in tensors)))


def not_expressible(params: Params, layout: str) -> list[str]:
    """Returns the paths of our parameters (arrays or shapes) for which the layout has no name."""
    return [row.path for row in jax.tree.leaves(parameter_rows(params)) if not row.names(layout)]


def _names(row: Parameter, leaf: Any, layout: str) -> list[tuple[str, ...]]:
    """Returns the other layout's names of a parameter, for each block where it is stacked."""
    count = leaf.shape[0] if row.is_stacked else 1
    return [tuple(name.format(block) for name in row.names(layout)) for block in range(count)]


def _name(group: str, path: str, layout: str) -> str:
    """Returns the one name of a parameter; it may be a constant here, which no parameter tree has."""
    (name,) = PARAMETERS[f"{group}/{path}"].names(layout)
    return name


def _positions_name(group: str, layout: str) -> str:
    return _name(group, "positions/embedding", layout)


def _view(
    row: Parameter, leaf: Any, patch: tuple[int, int, int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Returns how one block's array becomes the other layout's: its shape, how to reshape it, the axes to transpose.

    Arrays of several names are one behind another along the first axis. `patch` is (ph, pw, C).
    """
    shape = tuple(leaf.shape[1:] if row.is_stacked else leaf.shape)
    match row.stored:
        case "same":
            return shape, shape, tuple(range(len(shape)))
        case "flat":
            return shape, (math.prod(shape),), (0,)
        case "positions":  # (N, D) -> (1, N, D)
            return shape, (1, *shape), (0, 1, 2)
        case "patch":  # (ph * pw * C, D) -> (D, C, ph, pw)
            return shape, (*patch, shape[-1]), (3, 2, 0, 1)
        case inputs:  # (*in, *out) -> (out, in)
            return shape, (math.prod(shape[: int(inputs)]), math.prod(shape[int(inputs) :])), (1, 0)


def position_kind(
    tensors: Mapping[str, np.ndarray], layout: str, grid: tuple[int, int], num_cls: int
) -> tuple[str, str]:
    """Finds which fixed table the position embeddings are to the last bit; one kind for both transformers.

    Returns:
      The kind, or `learned`; and the dtype to which the table was rounded before it became float32.
    """
    found: dict[str, str] = {}
    for group in ("encoder", "decoder"):
        table = tensors.get(_positions_name(group, layout))
        if table is None or table.ndim != 3 or table.shape[1] != math.prod(grid) + num_cls:
            continue  # missing, or of another shape: `from_layout` reports it
        dim, table = table.shape[2], table[0, num_cls:]
        fits = [kind for kind, multiple in positions.FIXED_POSITIONS.items() if dim % multiple == 0]
        equal = (
            (kind, dtype.name)
            for kind in fits
            for dtype in _ROUNDINGS
            if np.array_equal(table, positions.fixed_positions(kind, grid, dim).astype(dtype).astype(np.float32))
        )
        kind, dtype = next(equal, ("learned", "float32"))
        found[kind] = dtype
    return found.popitem() if len(found) == 1 else ("learned", "float32")


def with_fixed_positions(tensors: Mapping[str, np.ndarray], kind: str, grid: tuple[int, int], num_cls: int) -> Tensors:
    """Adds fixed positions of `kind` to tensors of timm's layout, for each transformer that has none."""
    result = dict(tensors)
    for group, bias in (("encoder", "patch_embed/bias"), ("decoder", "embed/bias")):
        name, vector = _positions_name(group, "timm"), tensors.get(_name(group, bias, "timm"))
        if name not in result and vector is not None and vector.ndim == 1:
            table = positions.fixed_positions(kind, grid, len(vector))
            result[name] = np.concatenate([np.zeros((num_cls, len(vector)), np.float32), table])[None]
    return result


def without_zero_tokens(
    tensors: Mapping[str, np.ndarray], tokens: Sequence[str], layout: str
) -> tuple[Tensors, list[str]]:
    """Leaves out those of `tokens` (cls_token, mask_token) that are zero, as is their position; also says which."""
    result, constant = dict(tensors), []
    for token in tokens:
        group = "encoder" if token == "cls_token" else "decoder"
        name = _name(group, token, layout)
        position = tensors.get(_positions_name(group, layout)) if token == "cls_token" else None
        if name in result and not result[name].any() and (position is None or not position[:, :1].any()):
            del result[name]
            constant.append(token)
    return result, constant


def to_layout(params: Params, model: ConfigDict, layout: str) -> Tensors:
    """Returns our parameters under the other layout's names.

    Args:
      params: whole arrays of the groups to write, as a nested dict.
      model: the section `config.model` they belong to.
      layout: `hf` or `timm`. `not_expressible` must be empty, and for `hf` there must be a class token.

    Returns:
      float32 tensors by name. A token that is a constant zero here is a tensor of zeros there; fixed positions are
      written as the table they are.
    """
    patch = (*model.patch_size, model.channels)
    params = _with_constants(params, model)
    tensors: Tensors = {}
    for row, leaf in zip(jax.tree.leaves(parameter_rows(params)), jax.tree.leaves(params), strict=True):
        _, shape, axes = _view(row, leaf, patch)
        blocks = np.asarray(leaf) if row.is_stacked else np.asarray(leaf)[None]
        for names, block in zip(_names(row, leaf, layout), blocks, strict=True):
            value = block.reshape(shape).transpose(axes)
            for name, part in zip(names, np.split(value, len(names)), strict=True):
                tensors[name] = np.ascontiguousarray(part, np.float32)
    return tensors


def _with_constants(params: Params, model: ConfigDict) -> Params:
    """Adds fixed positions and tokens of zeros to parameters, and to positions (L, D) the class token's row: zeros."""
    grid = patches.grid_size(model.image_size, model.patch_size)
    num_cls = layers.count_cls_tokens(model.cls_token, model.cls_tokens)
    result = {group: dict(tree) for group, tree in params.items()}
    for group, dim, token in (
        ("encoder", model.embed_dim, "cls_token"),
        ("decoder", model.decoder_embed_dim, "mask_token"),
    ):
        if group in result:
            learned = result[group].get("positions")
            table = learned["embedding"] if learned else positions.fixed_positions(model.pos_embed, grid, dim)
            zero = np.zeros((num_cls, dim), np.float32)
            result[group]["positions"] = {"embedding": np.concatenate([zero, table])}
            if model[token] == "zero":
                result[group][token] = np.zeros((1, 1, dim), np.float32)
    return result


def from_layout(tensors: Mapping[str, np.ndarray], abstract: Params, model: ConfigDict, layout: str) -> Params:
    """Returns tensors under standard names as our parameters, all of them or none.

    Args:
      tensors: float32 by name.
      abstract: the parameters that `model` describes, as shapes.
      model: the section `config.model`, its `pos_embed` as `position_kind` found it.
      layout: `hf` or `timm`.

    Raises:
      DataFault: lists every tensor that is missing, has another shape, is not finite, or belongs to nothing here.
    """
    patch = (*model.patch_size, model.channels)
    num_cls = layers.count_cls_tokens(model.cls_token, model.cls_tokens)
    length = math.prod(patches.grid_size(model.image_size, model.patch_size)) + num_cls
    stored = {group: dict(tree) for group, tree in abstract.items()}
    for group, dim in (("encoder", model.embed_dim), ("decoder", model.decoder_embed_dim)):
        if group in stored:
            stored[group]["positions"] = {"embedding": jax.ShapeDtypeStruct((length, dim), np.float32)}
    rows = parameter_rows(stored)
    expected: dict[str, tuple[int, ...]] = {}
    for row, leaf in zip(jax.tree.leaves(rows), jax.tree.leaves(stored), strict=True):
        _, shape, axes = _view(row, leaf, patch)
        first, *rest = (shape[axis] for axis in axes)
        expected |= {name: (first // len(names), *rest) for names in _names(row, leaf, layout) for name in names}
    _check(tensors, expected)

    def read(row: Parameter, leaf: Any) -> np.ndarray:
        shape, _, axes = _view(row, leaf, patch)
        blocks = [
            np.concatenate([tensors[name] for name in names]).transpose(np.argsort(axes)).reshape(shape)
            for names in _names(row, leaf, layout)
        ]
        return np.stack(blocks) if row.is_stacked else np.ascontiguousarray(blocks[0])

    params = jax.tree.map(read, rows, stored)
    for group in ("encoder", "decoder"):
        if group in params:
            table = params[group].pop("positions")["embedding"]
            if table[:num_cls].any():  # added to the token it is the same function
                if "cls_token" not in params[group]:
                    raise DataFault(
                        f"{_positions_name(group, layout)}: row 0 is not zero: a position of the class token, which a "
                        "decoder here has not"
                    )
                params[group]["cls_token"] = params[group]["cls_token"] + table[:num_cls]
            if "positions" in abstract[group]:
                params[group]["positions"] = {"embedding": np.ascontiguousarray(table[num_cls:])}
    return params


def _check(tensors: Mapping[str, np.ndarray], expected: dict[str, tuple[int, ...]]) -> None:
    """Raises a `DataFault` that lists everything in which the tensors are not those expected."""
    faults = []
    for name, shape in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            faults.append(f"{name}: missing; expected shape {shape}")
        elif tensor.shape != shape:
            faults.append(f"{name}: shape {tensor.shape}, expected {shape}")
        elif not np.issubdtype(tensor.dtype, np.floating):
            faults.append(f"{name}: {tensor.dtype} values, expected floating-point ones")
        elif not np.isfinite(tensor).all():
            faults.append(f"{name}: {int((~np.isfinite(tensor)).sum())} of {tensor.size} values are not finite")
    faults += [
        f"{name}: shape {tensor.shape}, belongs to nothing here"
        for name, tensor in tensors.items()
        if name not in expected
    ]
    if faults:
        raise DataFault("the tensors do not fit the model:\n  - " + "\n  - ".join(faults))
