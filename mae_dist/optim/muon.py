"""Muon (Jordan et al. 2024): the momentum of each matrix of the blocks, orthogonalised; AdamW for all other parameters.

Shapes: n matrices, (m, k) one of them, m <= k.
"""

import math
from typing import Any

import jax
import optax
from jaxtyping import PyTree
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from mae_dist.model.parameters import Parameter

_STEPS = 5  # of the Newton-Schulz iteration
# An orthogonal matrix times 0.2 sqrt(max(m, k)) has the root mean square of AdamW's updates, so that learning rate and
# weight decay can be AdamW's (Liu et al. 2025, arXiv 2502.16982).
_RMS = 0.2


def _axes(row: Parameter) -> MuonDimensionNumbers | None:
    """Returns which axes are the rows and columns of a parameter's matrices; None where AdamW updates it."""
    return MuonDimensionNumbers(*row.matrix) if row.matrix else None


def _size(row: Parameter, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Returns (n, m, k) of a parameter that Muon updates."""
    assert row.matrix
    rows, columns = (math.prod(shape[axis] for axis in axes) for axes in row.matrix)
    return math.prod(shape) // (rows * columns), min(rows, columns), max(rows, columns)


def muon_or_adam(rows: PyTree, *, b1: float, b2: float, eps: float, momentum: float) -> optax.GradientTransformation:
    """Makes the transformation of gradients for a learning rate of 1.

    Each block has its own matrices, and so have queries, keys and values.

    Args:
      rows: a tree like the parameters, of their rows in the table of parameters.
      b1, b2, eps: Adam's.
      momentum: Muon's, Nesterov's.
    """

    def dimensions(params: PyTree) -> PyTree:
        del params
        return jax.tree.map(lambda row: _axes(row) or optax.MaskedNode(), rows)

    def rescale(updates: PyTree, params: PyTree) -> PyTree:
        del params

        def scale(row: Parameter, update: Any) -> Any:
            return update * (_RMS * math.sqrt(_size(row, update.shape)[2])) if row.matrix else update

        return jax.tree.map(scale, rows, updates, is_leaf=lambda x: isinstance(x, Parameter))

    orthogonal = scale_by_muon(ns_steps=_STEPS, beta=momentum, weight_dimension_numbers=dimensions)
    return optax.partition(
        {"muon": optax.chain(orthogonal, optax.stateless(rescale)), "adam": optax.scale_by_adam(b1=b1, b2=b2, eps=eps)},
        jax.tree.map(lambda row: "muon" if row.matrix else "adam", rows),
    )


def orthogonalisation_flops(row: Parameter, shape: tuple[int, ...]) -> float:
    """Counts the FLOPs of one step's iterations for a parameter, 0 where AdamW updates it.

    Each is X X^T, its square, and a product of the two with X.
    """
    if not row.matrix:
        return 0.0
    n, m, k = _size(row, shape)
    return float(_STEPS * n * (2 * 2 * m * m * k + 2 * m**3))
