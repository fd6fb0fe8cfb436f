"""Masking strategies: they choose the patches of an image that the encoder sees.

Shapes: B batch, L patches, K kept patches, (gh, gw) grid, g patches a side of a square of `mask_block`. A `mask` is 0
where a patch is kept and 1 where it is removed (He et al. 2021, section 3).

A strategy is one function, in this file or in a module of your own that `config.imports` names:

    @mae_dist.masking.register("center")
    def center(key, grid, num_keep):  # -> ids_shuffle (L,), the patches that are kept first
        ...
"""

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from mae_dist.errors import ConfigError
from mae_dist.registry import Registry, named_arguments

Function = TypeVar("Function", bound=Callable[..., Any])
# Rectangles that `block` draws per example; patches that are still missing after them are drawn at random.
_NUM_BLOCKS = 16


@dataclasses.dataclass(frozen=True)
class Strategy:
    """A registered strategy: the arguments of `register`."""

    draw: Callable[..., jax.Array]
    count: Callable[..., int]


STRATEGIES: Registry[Strategy] = Registry("model.masking")


def num_keep(num_patches: int, mask_ratio: float) -> int:
    """Returns int(L * (1 - mask_ratio)), rounded down in floating point exactly as in the paper's code."""
    return int(num_patches * (1 - mask_ratio))


def count_by_ratio(grid: tuple[int, int], *, mask_ratio: float) -> int:
    """Returns K for a strategy that keeps any number: int(L * (1 - mask_ratio))."""
    return num_keep(grid[0] * grid[1], mask_ratio) if math.isfinite(mask_ratio) else 0


def register(name: str, *, count: Callable[..., int] = count_by_ratio) -> Callable[[Function], Function]:
    """Decorates the function that draws one example's mask; `config.model.masking` then accepts `name`.

    The function takes (key, grid, num_keep) and returns `ids_shuffle` (L,): every patch once, the `num_keep` kept ones
    first. With `model.mask_block` patches are squares of these, and `grid` is the squares'. `jax.vmap` maps it over a
    batch, so it must be traceable and depend on nothing but its arguments, or masks would differ between devices. Both
    functions may take `mask_ratio` and `mask_file`, the fields of `config.model`, as keyword-only arguments.

    Args:
      name: the strategy's.
      count: (grid) -> K, how many patches are kept; by default int(L * (1 - mask_ratio)). It raises `ConfigError` for
        a grid or fields that the strategy does not support.

    Raises:
      ConfigError: another function has the name.
    """

    def add(draw: Function) -> Function:
        STRATEGIES.add(name, Strategy(draw, count), draw)
        return draw

    return add


def _ids_of(mask: np.ndarray) -> Int[Array, "L"]:
    """Returns the ids_shuffle of a mask (L,)."""
    return jnp.argsort(jnp.asarray(mask, jnp.float32), stable=True)


@register("random")
def _random(key: Key[Array, ""], grid: tuple[int, int], num_keep: int) -> Int[Array, "L"]:
    """Draws the kept patches uniformly, as the paper does."""
    del num_keep  # the order does not depend on it
    return jnp.argsort(jax.random.uniform(key, (grid[0] * grid[1],)), stable=True)


def grid_patterns(grid: tuple[int, int]) -> dict[int, np.ndarray]:
    """Returns every regular pattern of `grid`, by the number of patches that it keeps: masks (L,), 1 = removed.

    A pattern keeps, or removes, one patch of each (sh, sw) cell where sh and sw divide the grid. Of two cells with the
    same count the squarer one is used.
    """
    gh, gw = grid
    cells = [(sh, sw) for sh in range(1, gh + 1) for sw in range(1, gw + 1) if gh % sh == gw % sw == 0 and sh * sw > 1]
    patterns: dict[int, np.ndarray] = {}
    for sh, sw in sorted(cells, key=lambda cell: abs(math.log(cell[0] / cell[1]))):
        first = (np.arange(gh)[:, None] % sh == 0) & (np.arange(gw)[None, :] % sw == 0)  # (gh, gw)
        for kept in (first, ~first):
            patterns.setdefault(int(kept.sum()), 1 - kept.reshape(-1).astype(np.int32))
    return patterns


def grid_mask(grid: tuple[int, int], mask_ratio: float) -> np.ndarray:
    """Returns the regular mask (L,) that removes `mask_ratio` of the patches; `ConfigError` lists the others."""
    patterns = grid_patterns(grid)
    length = grid[0] * grid[1]
    for kept, mask in patterns.items():
        if abs((1 - kept / length) - mask_ratio) < 1e-6:
            return mask
    ratios = ", ".join(f"{1 - kept / length:.6g}" for kept in sorted(patterns, reverse=True))
    raise ConfigError(
        f"model.masking 'grid' cannot remove model.mask_ratio={mask_ratio:g} of a {grid[0]}x{grid[1]} patch grid; "
        f"ratios it can give: {ratios}"
    )


@register("grid", count=lambda grid, *, mask_ratio: int((1 - grid_mask(grid, mask_ratio)).sum()))
def _grid(key: Key[Array, ""], grid: tuple[int, int], num_keep: int) -> Int[Array, "L"]:
    """Keeps the same regular pattern of patches in every image."""
    del key
    return _ids_of(grid_patterns(grid)[num_keep])


@register("block")
def _block(key: Key[Array, ""], grid: tuple[int, int], num_keep: int) -> Int[Array, "L"]:
    """Removes rectangle after rectangle, as BEiT places its blocks.

    Each of `_NUM_BLOCKS` rectangles has an area between 8 % of the image and the whole removal, and an aspect between
    0.3 and 1/0.3. Patches no rectangle covers come last, at random.
    """
    gh, gw = grid
    length, num_removed = gh * gw, gh * gw - num_keep
    k_area, k_aspect, k_top, k_left, k_rest = jax.random.split(key, 5)
    low = max(1.0, length * 16 / 196)  # BEiT: at least 16 of 196 patches
    shape = (_NUM_BLOCKS,)
    area = jax.random.uniform(k_area, shape, minval=min(low, float(num_removed)), maxval=float(num_removed) + 1e-3)
    aspect = jnp.exp(jax.random.uniform(k_aspect, shape, minval=math.log(0.3), maxval=-math.log(0.3)))
    height = jnp.clip(jnp.round(jnp.sqrt(area * aspect)), 1, gh)
    width = jnp.clip(jnp.round(jnp.sqrt(area / aspect)), 1, gw)
    top = jnp.floor(jax.random.uniform(k_top, shape) * (gh - height + 1))
    left = jnp.floor(jax.random.uniform(k_left, shape) * (gw - width + 1))
    rows = jnp.arange(gh, dtype=jnp.float32)[None, :, None]
    cols = jnp.arange(gw, dtype=jnp.float32)[None, None, :]
    top, left, height, width = (v[:, None, None] for v in (top, left, height, width))
    inside = (rows >= top) & (rows < top + height) & (cols >= left) & (cols < left + width)  # (blocks, gh, gw)
    inside = inside.reshape(_NUM_BLOCKS, length)
    block = jnp.where(inside.any(0), jnp.argmax(inside, 0), _NUM_BLOCKS).astype(jnp.float32)
    # Raster order within a block keeps the last block connected if it is cut short.
    raster = jnp.arange(length, dtype=jnp.float32) / length
    within = jnp.where(block < _NUM_BLOCKS, raster, jax.random.uniform(k_rest, (length,)))
    return jnp.argsort(-(block + within), stable=True)


def load_user_mask(path: str, grid: tuple[int, int]) -> np.ndarray:
    """Reads a mask from a `.npy` file of shape (gh, gw) or (L,), 1 (or True) where a patch is removed; returns (L,)."""
    try:
        mask = np.load(os.path.expanduser(path), allow_pickle=False)
        flat = mask.astype(np.int32).reshape(-1)
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"model.mask_file {path!r} cannot be read as a .npy array: {error}") from error
    length = grid[0] * grid[1]
    if mask.shape not in (grid, (length,)) or not np.isin(flat, (0, 1)).all() or not 0 < flat.sum() < length:
        raise ConfigError(
            f"model.mask_file {path!r} has shape {mask.shape} and {int(flat.sum())} removed patches; needed: shape "
            f"{grid} or ({length},), values 0 (keep) and 1 (remove), at least one of each"
        )
    return flat


@register("user", count=lambda grid, *, mask_file: int((1 - load_user_mask(mask_file, grid)).sum()))
def _user(key: Key[Array, ""], grid: tuple[int, int], num_keep: int, *, mask_file: str) -> Int[Array, "L"]:
    """Removes the same patches of every image, as a file says."""
    del key, num_keep
    return _ids_of(load_user_mask(mask_file, grid))


def _coarse(grid: tuple[int, int], mask_block: int) -> tuple[int, int]:
    """Returns the grid of squares of `mask_block` patches a side; `ConfigError` if they do not tile `grid`."""
    if mask_block < 1 or any(side % mask_block for side in grid):
        fitting = [g for g in range(1, min(grid) + 1) if not any(side % g for side in grid)]
        raise ConfigError(
            f"model.mask_block={mask_block} does not divide the grid of {grid[0]}x{grid[1]} patches; choose "
            f"{' or '.join(map(str, fitting))}"
        )
    return grid[0] // mask_block, grid[1] // mask_block


def _refine(ids_shuffle: Int[Array, "B squares"], grid: tuple[int, int], mask_block: int) -> Int[Array, "B L"]:
    """Replaces each square of a coarse mask by its g * g patches of `grid`."""
    gh, gw = grid
    numbers = np.arange(gh * gw, dtype=np.int32).reshape(gh // mask_block, mask_block, gw // mask_block, mask_block)
    patches_of = numbers.transpose(0, 2, 1, 3).reshape(-1, mask_block**2)  # (squares, g * g)
    return jnp.asarray(patches_of)[ids_shuffle].reshape(len(ids_shuffle), -1)


def draw_ids_shuffle(
    keys: Key[Array, "B"],
    *,
    strategy: str,
    grid: tuple[int, int],
    mask_ratio: float,
    mask_file: str = "",
    mask_block: int = 1,
) -> tuple[Int[Array, "B L"], int]:
    """Draws one mask per example.

    Args:
      keys: an example's mask depends on its own key alone.
      strategy: the name of a registered strategy.
      grid: (gh, gw).
      mask_ratio: fraction of patches to remove.
      mask_file: for `user`.
      mask_block: patches a side of the squares that are kept or removed as one; the strategy masks the grid of these.

    Returns:
      `ids_shuffle` (B, L) int32, patch indices with the kept ones first, and K, how many are kept.

    Raises:
      ConfigError: the strategy is unknown, does not support the arguments, or returns anything but (L,) integers.
    """
    fields = {"mask_ratio": mask_ratio, "mask_file": mask_file}
    whole, grid = grid, _coarse(grid, mask_block)
    kept = count_kept(strategy=strategy, grid=grid, mask_ratio=mask_ratio, mask_file=mask_file)
    draw, what = STRATEGIES.get(strategy).draw, f"the function of model.masking={strategy!r}"
    asked = named_arguments(draw, fields, what)
    ids_shuffle = jax.vmap(lambda key: jnp.asarray(draw(key, grid, kept, **asked)))(keys)  # (B, L)
    if ids_shuffle.shape[1:] != (grid[0] * grid[1],) or not jnp.issubdtype(ids_shuffle.dtype, jnp.integer):
        raise ConfigError(
            f"{what} returns {ids_shuffle.dtype} of shape {ids_shuffle.shape[1:]}; needed: ids_shuffle, integers of "
            f"shape ({grid[0] * grid[1]},), the {kept} patches that are kept first"
        )
    ids_shuffle = ids_shuffle.astype(jnp.int32)
    if mask_block > 1:
        ids_shuffle = _refine(ids_shuffle, whole, mask_block)
    return ids_shuffle, kept * mask_block**2


def count_kept(
    *, strategy: str, grid: tuple[int, int], mask_ratio: float, mask_file: str = "", mask_block: int = 1
) -> int:
    """Returns K, the number of patches that `draw_ids_shuffle` keeps; same arguments and errors."""
    count = STRATEGIES.get(strategy).count
    fields = {"mask_ratio": mask_ratio, "mask_file": mask_file}
    asked = named_arguments(count, fields, f"the count of model.masking={strategy!r}")
    return count(_coarse(grid, mask_block), **asked) * mask_block**2


def count_predicted(num_removed: int, predict_ratio: float) -> int:
    """Returns how many of an image's removed patches are predicted in training, `predict_ratio` of them, rounded."""
    return round(num_removed * predict_ratio) if math.isfinite(predict_ratio) else 0


def keep_predicted(
    keys: Key[Array, "B"], ids_shuffle: Int[Array, "B L"], kept: int, count: int
) -> Int[Array, "B predicted"]:
    """Draws `count` of each example's removed patches, which come after its kept ones; the others are left out.

    They are drawn whatever the strategy: only `random` orders removed patches at random.
    """

    def draw(key: jax.Array, removed: jax.Array) -> jax.Array:
        return removed[jnp.argsort(jax.random.uniform(key, removed.shape))[:count]]

    return jnp.concatenate([ids_shuffle[:, :kept], jax.vmap(draw)(keys, ids_shuffle[:, kept:])], axis=1)


def restore_ids(ids_shuffle: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """Returns `ids_restore`, the inverse permutation: each patch's place in shuffled order."""
    return jnp.argsort(ids_shuffle, axis=1).astype(jnp.int32)


def mask_from_ids(ids_restore: Int[Array, "B L"], kept: int) -> Float[Array, "B L"]:
    """Returns the mask, 0 where a patch is kept and 1 where it is removed."""
    return (ids_restore >= kept).astype(jnp.float32)
