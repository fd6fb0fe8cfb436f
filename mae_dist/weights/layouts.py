"""Other implementations' names and shapes for our parameters: Hugging Face's ViTMAE and ViT, and timm's.

`timm` is the layout of timm's vision transformers, which the paper's own code extends by a decoder; `hf` that of
`transformers`. Nothing is read or written here: tensors are NumPy arrays by name, ours a nested dict.

Shapes: D width, H heads, hd = D / H, M MLP width, L patches, C channels, (ph, pw) patch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

from mae_dist.errors import DataFault
from mae_dist.model import patches, positions
from mae_dist.model.parameters import PARAMETERS, Parameter, parameter_rows

LAYOUTS = ("hf", "timm")
# To which tables of fixed positions may have been rounded on their way here.
_ROUNDINGS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
Tensors = dict[str, np.ndarray]
Params = dict[str, Any]


def groups_in(tensors: Mapping[str, np.ndarray], layout: str) -> tuple[str, ...]:
    """Which of encoder, decoder and head the (standard) names belong to, in this order."""
    prefixes = {
        "hf": {"decoder": ("decoder.",), "head": ("classifier.",)},
        "timm": {"decoder": ("decoder_", "mask_token"), "head": ("head.", "fc_norm.")},
    }[layout]
    return ("encoder", *(group for group, starts in prefixes.items() if any(n.startswith(starts) for n in tensors)))


def not_expressible(params: Params, layout: str) -> list[str]:
    """Our parameters (arrays or shapes) for which the layout has no name."""
    return [row.path for row in jax.tree.leaves(parameter_rows(params)) if not row.names(layout)]


def _places(params: Params, layout: str) -> Iterator[tuple[Parameter, int | None, Any, tuple[str, ...]]]:
    """(row, block or None, shape of ours, foreign names) of every array there is on the other side but positions."""
    for row, leaf in zip(jax.tree.leaves(parameter_rows(params)), jax.tree.leaves(params), strict=True):
        names = row.names(layout)
        assert names, f"{row.path} cannot be expressed: ask not_expressible first"
        if row.stored == "positions":
            continue
        if not row.is_stacked:
            yield row, None, tuple(leaf.shape), names
            continue
        for block in range(leaf.shape[0]):
            yield row, block, tuple(leaf.shape[1:]), tuple(name.format(block) for name in names)


def _name(group: str, path: str, layout: str) -> str:
    """The one name of a parameter; a constant here, which no model's tree has, may be a tensor there."""
    (name,) = PARAMETERS[f"{group}/{path}"].names(layout)
    return name


def _positions_name(group: str, layout: str) -> str:
    return _name(group, "positions/embedding", layout)


def _forward(x: np.ndarray, stored: str | int, patch: tuple[int, int, int]) -> np.ndarray:
    """Ours -> theirs; `patch` is (ph, pw, C)."""
    if stored == "same":
        return x
    if stored == "flat":
        return x.reshape(-1)
    if stored == "patch":  # (ph * pw * C, D) -> (D, C, ph, pw)
        return x.reshape(*patch, x.shape[-1]).transpose(3, 2, 0, 1)
    return x.reshape(math.prod(x.shape[: int(stored)]), -1).T  # (in, out) -> (out, in)


def _their_shape(shape: tuple[int, ...], stored: str | int, patch: tuple[int, int, int]) -> tuple[int, ...]:
    """The shape of `_forward`'s result, without an array: a description may claim any size."""
    if stored == "same":
        return shape
    if stored == "flat":
        return (math.prod(shape),)
    if stored == "patch":
        return shape[-1], patch[2], *patch[:2]
    inputs = int(stored)
    return math.prod(shape[inputs:]), math.prod(shape[:inputs])


def _backward(x: np.ndarray, stored: str | int, shape: tuple[int, ...]) -> np.ndarray:
    """Theirs -> ours of this shape."""
    if stored == "patch":  # (D, C, ph, pw) -> (ph * pw * C, D)
        x = x.transpose(2, 3, 1, 0)
    elif stored not in ("same", "flat"):
        x = x.T
    return np.ascontiguousarray(x.reshape(shape))


def position_kind(
    tensors: Mapping[str, np.ndarray], layout: str, grid: tuple[int, int], has_cls: bool
) -> tuple[str, str]:
    """Which fixed table the position embeddings are to the last bit, or `learned`; one kind for both transformers.

    Also the dtype to which such a table was rounded once, and so cannot be told from a float32 one that was.
    """
    found: dict[str, str] = {}
    for group in ("encoder", "decoder"):
        table = tensors.get(_positions_name(group, layout))
        if table is None or table.ndim != 3 or table.shape[1] != math.prod(grid) + int(has_cls):
            continue  # not there, or misshapen: `from_layout` says so
        dim, table = table.shape[2], table[0, int(has_cls) :]
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


def with_fixed_positions(tensors: Mapping[str, np.ndarray], kind: str, grid: tuple[int, int], has_cls: bool) -> Tensors:
    """Tensors of timm's layout and, for each transformer whose positions are not there, the fixed ones of `kind`."""
    result = dict(tensors)
    for group, bias in (("encoder", "patch_embed/bias"), ("decoder", "embed/bias")):
        name, vector = _positions_name(group, "timm"), tensors.get(_name(group, bias, "timm"))
        if name not in result and vector is not None and vector.ndim == 1:
            table = positions.fixed_positions(kind, grid, len(vector))
            result[name] = np.concatenate([np.zeros((int(has_cls), len(vector)), np.float32), table])[None]
    return result


def without_zero_tokens(
    tensors: Mapping[str, np.ndarray], tokens: Sequence[str], layout: str
) -> tuple[Tensors, list[str]]:
    """Leaves out those of `tokens` (cls_token, mask_token) that are zero; also says which. A position counts."""
    result, constant = dict(tensors), []
    for token in tokens:
        group = "encoder" if token == "cls_token" else "decoder"
        name = _name(group, token, layout)
        position = tensors.get(_positions_name(group, layout)) if token == "cls_token" else None
        if name in result and not result[name].any() and (position is None or not position[:, :1].any()):
            del result[name]
            constant.append(token)
    return result, constant


def to_layout(params: Params, model: Any, layout: str) -> Tensors:
    """Our parameters under the other side's names.

    Args:
      params: whole arrays of the groups to write, as a nested dict.
      model: the section `config.model` they belong to.
      layout: `hf` or `timm`. `not_expressible` must be empty, and for `hf` there must be a class token.

    Returns:
      float32 tensors by name. A token that is a constant zero here is a tensor of zeros there; fixed positions are
      written as the table they are.
    """
    patch = (*model.patch_size, model.channels)
    grid = patches.grid_size(model.image_size, model.patch_size)
    tensors: Tensors = {}
    for row, block, _, names in _places(params, layout):
        leaf: Any = params
        for key in row.path.split("/"):
            leaf = leaf[key]
        value = _forward(np.asarray(leaf if block is None else leaf[block]), row.stored, patch)
        for name, part in zip(names, np.split(value, len(names)), strict=True):
            tensors[name] = np.ascontiguousarray(part, np.float32)
    for group, dim, token in (
        ("encoder", model.embed_dim, "cls_token"),
        ("decoder", model.decoder_embed_dim, "mask_token"),
    ):
        if group not in params:
            continue
        learned = params[group].get("positions")
        table = (
            np.asarray(learned["embedding"]) if learned else positions.fixed_positions(model.pos_embed, grid, dim)
        )  # (L, D)
        zero = np.zeros((int(model.cls_token != "none"), dim), np.float32)  # the class token has no position
        tensors[_positions_name(group, layout)] = np.concatenate([zero, table])[None].astype(np.float32)
        if model[token] == "zero":
            tensors[_name(group, token, layout)] = np.zeros((1, 1, dim), np.float32)
    return tensors


def from_layout(tensors: Mapping[str, np.ndarray], abstract: Params, model: Any, layout: str) -> Params:
    """Tensors under standard names -> our parameters, all of them or none.

    Args:
      tensors: float32 by name.
      abstract: the parameters that `model` describes, as shapes.
      model: the section `config.model`, its `pos_embed` as `position_kind` found it.
      layout: `hf` or `timm`.

    Raises:
      DataFault: lists every tensor that is missing, has another shape, is not finite, or belongs to nothing here.
    """
    patch = (*model.patch_size, model.channels)
    places = list(_places(abstract, layout))
    expected: dict[str, tuple[int, ...]] = {}
    for row, _, shape, names in places:
        first, *rest = _their_shape(shape, row.stored, patch)
        expected |= {name: (first // len(names), *rest) for name in names}
    has_cls = model.cls_token != "none"
    length = math.prod(patches.grid_size(model.image_size, model.patch_size))
    for group, dim in (("encoder", model.embed_dim), ("decoder", model.decoder_embed_dim)):
        if group in abstract:
            expected[_positions_name(group, layout)] = (1, length + int(has_cls), dim)
    _check(tensors, expected)

    params: Params = {}
    blocks: dict[str, list[np.ndarray]] = {}
    for row, block, shape, names in places:
        value = _backward(np.concatenate([tensors[name] for name in names]), row.stored, shape)
        if block is None:
            _put(params, row.path, value)
        else:
            blocks.setdefault(row.path, []).append(value)
    for path, values in blocks.items():
        _put(params, path, np.stack(values))
    for group in ("encoder", "decoder"):
        if group in abstract:
            name = _positions_name(group, layout)
            _put_positions(params[group], tensors[name][0], has_cls, "positions" in abstract[group], name)
    return params


def _check(tensors: Mapping[str, np.ndarray], expected: dict[str, tuple[int, ...]]) -> None:
    """Lists everything in which the tensors are not those expected."""
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


def _put(params: Params, path: str, value: np.ndarray) -> None:
    *above, key = path.split("/")
    for name in above:
        params = params.setdefault(name, {})
    params[key] = value


def _put_positions(group: Params, table: np.ndarray, has_cls: bool, learned: bool, name: str) -> None:
    """Puts a learned table (N, D) into its group; a class token's own position is added to the token: no difference."""
    if has_cls and table[0].any():
        if "cls_token" not in group:
            raise DataFault(f"{name}: row 0 is not zero: a position of the class token, which a decoder here has not")
        group["cls_token"] = group["cls_token"] + table[0]
    if learned:
        _put(group, "positions/embedding", np.ascontiguousarray(table[int(has_cls) :]))
