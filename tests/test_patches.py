"""Patches, masks and position embeddings against pictures drawn by hand and loops written out."""

import functools
import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_dist.errors import ConfigError
from mae_dist.model import masking, patches, positions
from tests import reference

GRID = (4, 6)
LENGTH = 24
CHECKER = (np.indices(GRID).sum(axis=0) % 2).reshape(-1).astype(np.int32)
CHECKER_FILE = os.path.join(tempfile.mkdtemp(), "checker.npy")
np.save(CHECKER_FILE, CHECKER)
STRATEGIES = ("random", "grid", "block", "user")
KEYS = jax.random.split(jax.random.key(0), 64)


@functools.cache
def drawer(strategy: str, grid: tuple[int, int] = GRID, mask_ratio: float = 0.75):
    """A compiled keys (B,) -> (ids_shuffle, kept, ids_restore, mask)."""

    @jax.jit
    def run(keys: jax.Array):
        ids, kept = masking.draw_ids_shuffle(
            keys, strategy=strategy, grid=grid, mask_ratio=mask_ratio, mask_file=CHECKER_FILE
        )
        restore = masking.restore_ids(ids)
        return ids, kept, restore, masking.mask_from_ids(restore, kept)

    return run


def draw(strategy: str) -> tuple[np.ndarray, int]:
    """ids_shuffle (B, L) and K."""
    ids, kept, _, _ = drawer(strategy)(KEYS)
    return np.asarray(ids), int(kept)


def masks(strategy: str, keys: jax.Array = KEYS) -> np.ndarray:
    """(B, L), 1 = removed."""
    return np.asarray(drawer(strategy)(keys)[3])


@settings(max_examples=20)
@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    patch_size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    channels=st.integers(1, 4),
    batch=st.integers(1, 3),
)
def test_unpatchify_undoes_patchify(grid, patch_size, channels, batch):
    """Otherwise pictures and losses would be of scrambled images."""
    size = (grid[0] * patch_size[0], grid[1] * patch_size[1])
    images = np.arange(batch * size[0] * size[1] * channels, dtype=np.float32).reshape(batch, *size, channels)

    @jax.jit
    def there_and_back(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        cut = patches.patchify(x, patch_size)
        return cut, patches.unpatchify(cut, size, patch_size)

    cut, back = there_and_back(images)
    assert cut.shape == (batch, grid[0] * grid[1], patch_size[0] * patch_size[1] * channels)
    np.testing.assert_array_equal(cut, reference.cut(images, patch_size))
    np.testing.assert_array_equal(back, images)


def test_patch_order_by_hand():
    """Raster order of patches, and (row, column, channel) within one: what stored weights rely on."""
    image = jnp.arange(4 * 4 * 2, dtype=jnp.float32).reshape(1, 4, 4, 2)  # value = 8 row + 2 column + channel
    cut = np.asarray(patches.patchify(image, (2, 2)))[0]
    assert cut[0].tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert cut[1].tolist() == [4, 5, 6, 7, 12, 13, 14, 15]
    assert cut[2].tolist() == [16, 17, 18, 19, 24, 25, 26, 27]


def test_patch_that_does_not_divide_names_the_nearest():
    """A crash inside reshape would not say which field to change."""
    with pytest.raises(ConfigError, match=r"patch_size 5 does not divide the image width 32 .*nearest that does: 4"):
        patches.grid_size((30, 32), (5, 5))
    with pytest.raises(ConfigError, match="patch_size 0 does not divide the image height 30"):
        patches.grid_size((30, 32), (0, 4))


@pytest.mark.parametrize(
    ("length", "ratio", "kept"), [(196, 0.75, 49), (64, 0.75, 16), (256, 0.75, 64), (10, 0.75, 2), (64, 0.9, 6)]
)
def test_num_keep(length, ratio, kept):
    """int(L * (1 - ratio)), as in the paper's code."""
    assert masking.num_keep(length, ratio) == kept


@pytest.mark.parametrize(("strategy", "kept"), [("random", 6), ("grid", 6), ("block", 6), ("user", 12)])
def test_mask_counts(strategy, kept):
    """Another count in one row would put mask tokens in place of kept patches."""
    ids, k = draw(strategy)
    assert k == kept
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(np.sort(ids, axis=1), np.broadcast_to(np.arange(LENGTH), ids.shape))
    np.testing.assert_array_equal(masks(strategy).sum(axis=1), LENGTH - kept)


@pytest.mark.parametrize("strategy", ["random", "block"])
def test_each_example_has_its_own_mask(strategy):
    """One mask for a whole batch is a well-known trap; a row may depend on nothing but its own key."""
    drawn = masks(strategy)
    assert len(np.unique(drawn, axis=0)) > 48
    order = np.random.default_rng(0).permutation(len(KEYS))
    np.testing.assert_array_equal(masks(strategy, KEYS[order]), drawn[order])
    others = jnp.concatenate([KEYS[:3], KEYS[:1], KEYS[4:]])
    np.testing.assert_array_equal(masks(strategy, others)[:3], drawn[:3])
    np.testing.assert_array_equal(masks(strategy, others)[3], drawn[0])


@pytest.mark.parametrize("strategy", ["grid", "user"])
def test_regular_masks_are_the_same_for_every_example(strategy):
    """Regular masks depend on no key."""
    assert len(np.unique(masks(strategy), axis=0)) == 1


def test_user_mask_is_followed_to_the_letter():
    """The removed patches are those with a 1 and the kept ones stay in raster order."""
    np.testing.assert_array_equal(masks("user")[0], CHECKER)
    ids, kept = draw("user")
    np.testing.assert_array_equal(ids[0, :kept], np.flatnonzero(CHECKER == 0))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_restore_puts_every_patch_back(strategy):
    """A grid decoder that restored wrongly trained and evaluated without an error elsewhere."""
    ids, kept, restore, mask = drawer(strategy)(KEYS)
    x = jax.random.normal(jax.random.key(1), (len(KEYS), LENGTH, 3))
    np.testing.assert_array_equal(patches.take_patches(patches.take_patches(x, ids), restore), x)
    for shuffled, row in zip(np.asarray(ids), np.asarray(mask), strict=True):
        assert set(np.flatnonzero(row == 0)) == set(shuffled[: int(kept)])


def test_random_masks_are_uniform():
    """Every patch is kept equally often: K / L within five standard deviations."""
    drawn = [masks("random", keys) for keys in jax.random.split(jax.random.key(3), (32, len(KEYS)))]
    share = 1 - np.concatenate(drawn).mean(axis=0)
    assert np.abs(share - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / (32 * len(KEYS)))


@pytest.mark.parametrize("grid", [(4, 6), (8, 8), (3, 9)])
def test_grid_patterns_are_regular(grid):
    """Every pattern repeats with its cell, so no region of the image is seen more than another."""
    patterns = masking.grid_patterns(grid)
    assert patterns
    for kept, mask in patterns.items():
        picture = mask.reshape(grid)
        assert (picture == 0).sum() == kept
        assert set(np.unique(picture)) == {0, 1}
        cells = [
            (sh, sw)
            for sh in range(1, grid[0] + 1)
            for sw in range(1, grid[1] + 1)
            if grid[0] % sh == 0
            and grid[1] % sw == 0
            and sh * sw in (grid[0] * grid[1] // kept, grid[0] * grid[1] // (grid[0] * grid[1] - kept))
        ]
        assert any(
            (np.roll(picture, sh, 0) == picture).all() and (np.roll(picture, sw, 1) == picture).all()
            for sh, sw in cells
        )


def test_grid_three_quarters_keeps_every_second_of_every_second_row():
    """The paper's figure 6: one of each 2x2."""
    kept = 1 - masking.grid_mask((4, 4), 0.75).reshape(4, 4)
    np.testing.assert_array_equal(kept, [[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])


def test_grid_ratio_that_does_not_exist_lists_those_that_do():
    """The message is the only place where a user can learn them."""
    with pytest.raises(ConfigError) as error:
        masking.grid_mask((4, 4), 0.7)
    message = str(error.value)
    assert "mask_ratio=0.7 of a 4x4 patch grid" in message
    assert message.endswith("0.0625, 0.125, 0.25, 0.5, 0.75, 0.875, 0.9375")


def _removed_neighbours(drawn: np.ndarray, grid: tuple[int, int]) -> float:
    """Mean number of removed patches among the four neighbours of a removed one."""
    x = np.pad(drawn.reshape(-1, *grid), ((0, 0), (1, 1), (1, 1)))
    around = x[:, :-2, 1:-1] + x[:, 2:, 1:-1] + x[:, 1:-1, :-2] + x[:, 1:-1, 2:]
    return float(around[x[:, 1:-1, 1:-1] == 1].mean())


@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_block_masks_are_blocky(ratio):
    """Otherwise `block` would be `random` under another name."""
    grid = (8, 8)
    drawn = {}
    for strategy in ("random", "block"):
        drawn[strategy] = np.asarray(drawer(strategy, grid, ratio)(KEYS)[3])
        assert (drawn[strategy].sum(axis=1) == 64 - masking.num_keep(64, ratio)).all()
    random, block = (_removed_neighbours(drawn[strategy], grid) for strategy in ("random", "block"))
    ceiling = _removed_neighbours(np.ones((1, 64)), grid)
    assert block > random + 0.4 * (ceiling - random)


@pytest.mark.parametrize("strategy", ["random", "grid", "block"])
@pytest.mark.parametrize("side", [1, 2, 4, 8])
def test_squares_are_kept_or_removed_as_one(strategy, side):
    """On the grid of the squares it is the strategy's own mask, and every count is exact."""
    grid = (8, 16)
    options = {"strategy": strategy, "mask_ratio": 0.5}
    ids, kept = masking.draw_ids_shuffle(KEYS, grid=grid, mask_block=side, **options)
    assert kept == masking.count_kept(grid=grid, mask_block=side, **options) == 64
    np.testing.assert_array_equal(np.sort(ids, axis=1), np.broadcast_to(np.arange(128), ids.shape))
    drawn = np.asarray(masking.mask_from_ids(masking.restore_ids(ids), kept)).reshape(-1, *grid)
    coarse, count = masking.draw_ids_shuffle(KEYS, grid=(8 // side, 16 // side), **options)
    expected = np.asarray(masking.mask_from_ids(masking.restore_ids(coarse), count))
    expected = expected.reshape(-1, 8 // side, 16 // side).repeat(side, axis=1).repeat(side, axis=2)
    np.testing.assert_array_equal(drawn, expected)


def test_user_mask_file(tmp_path: Path):
    """Both shapes are read; anything else says what it is and what is needed."""
    path = str(tmp_path / "mask.npy")
    for mask in (CHECKER, CHECKER.reshape(GRID), CHECKER.astype(bool)):
        np.save(path, mask)
        np.testing.assert_array_equal(masking.load_user_mask(path, GRID), CHECKER)
    for mask in (CHECKER[:-1], CHECKER * 2, np.zeros(GRID), np.ones(GRID), CHECKER.reshape(6, 4)):
        np.save(path, mask)
        with pytest.raises(ConfigError, match=r"mask_file .* needed: shape \(4, 6\) or \(24,\)"):
            masking.load_user_mask(path, GRID)
    with pytest.raises(ConfigError, match=r"cannot be read as a \.npy array"):
        masking.load_user_mask(str(tmp_path / "nothing.npy"), GRID)


@pytest.mark.parametrize(("grid", "dim"), [((4, 6), 8), ((7, 3), 64), ((1, 1), 4)])
def test_sincos_against_the_formula(grid, dim):
    """The positions are not trained: a wrong one is never repaired."""
    for kind, function in (("sincos1d", positions.sincos_1d), ("sincos2d", positions.sincos_2d)):
        table = function(grid, dim)
        assert table.dtype == np.float32
        np.testing.assert_allclose(table, reference.fixed_positions(kind, grid, dim), atol=1e-6)


def test_sincos_2d_encodes_column_then_row():
    """The paper's code gives the first half to the column; stored weights rely on it."""
    table = positions.sincos_2d((3, 5), 16).reshape(3, 5, 16)
    assert (table[:, :, :8] == table[:1, :, :8]).all()
    assert (table[:, :, 8:] == table[:, :1, 8:]).all()
    assert len(np.unique(table.reshape(15, 16), axis=0)) == 15
