"""Position embeddings: fixed sines and cosines, or learned.

Shapes: L patches, D width, (gh, gw) grid.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from mae_dist.model.layers import normal02


class Positions(nnx.Module):
    """Position embeddings (L, D): fixed ones are constants of the program, learned ones a parameter."""

    def __init__(self, kind: str, grid: tuple[int, int], dim: int, *, rngs: nnx.Rngs):
        self.kind, self.grid, self.dim = kind, grid, dim
        if kind == "learned":
            self.embedding = nnx.Param(normal02(rngs.params(), (grid[0] * grid[1], dim), jnp.float32))

    def __call__(self, dtype: jnp.dtype) -> Float[Array, "1 L D"]:
        """Returns the embeddings in `dtype`."""
        if self.kind == "learned":
            table = self.embedding[...]
        else:
            table = jnp.asarray(fixed_positions(self.kind, self.grid, self.dim))
        return table.astype(dtype)[None]


POSITIONS = ("sincos2d", "sincos1d", "learned")
# The width of fixed embeddings must be a multiple of this.
FIXED_POSITIONS = {"sincos2d": 4, "sincos1d": 2}


def _sincos(positions: np.ndarray, dim: int) -> np.ndarray:
    """Returns sines of dim / 2 frequencies, then their cosines (Vaswani et al. 2017): (L,) -> (L, dim)."""
    omega = 1.0 / 10000 ** (np.arange(dim // 2, dtype=np.float64) / (dim / 2))
    angles = np.outer(positions.reshape(-1).astype(np.float64), omega)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def sincos_1d(grid: tuple[int, int], dim: int) -> np.ndarray:
    """Returns fixed embeddings (L, D) of the raster index, D even."""
    return _sincos(np.arange(grid[0] * grid[1]), dim).astype(np.float32)


def sincos_2d(grid: tuple[int, int], dim: int) -> np.ndarray:
    """Returns the paper's fixed embeddings (L, D): D / 2 values for the column, then D / 2 for the row; D % 4 == 0."""
    rows, cols = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    return np.concatenate([_sincos(cols, dim // 2), _sincos(rows, dim // 2)], axis=1).astype(np.float32)


def fixed_positions(kind: str, grid: tuple[int, int], dim: int) -> np.ndarray:
    """Returns the table (L, D) of `sincos2d` or `sincos1d`."""
    return (sincos_2d if kind == "sincos2d" else sincos_1d)(grid, dim)
