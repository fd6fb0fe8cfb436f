"""The functions that a platform may replace in a model; up to rounding the results are the same.

A module is given one `Hooks` and calls its functions. The default is plain JAX, which supports every transformation,
forward mode included. `mae_dist/platforms.py` chooses.
"""

import dataclasses
from collections.abc import Callable

import jax

from mae_dist.model import functional
from mae_dist.model.attention import attention


def unconstrained(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Returns `x` as it is: one device needs no sharding constraint."""
    del axes
    return x


@dataclasses.dataclass(frozen=True)
class Hooks:
    """Functions that a model's modules call.

    Attributes:
      constrain: (array, logical axes) -> array; constrains an activation's sharding. Models know logical axes, no mesh.
      affine: as `functional.affine`.
      gelu: as `functional.gelu`.
      attention: as `attention.attention`.
    """

    constrain: Callable[[jax.Array, tuple[str | None, ...]], jax.Array] = unconstrained
    affine: Callable[[jax.Array, jax.Array, jax.Array | None, int], jax.Array] = functional.affine
    gelu: Callable[[jax.Array, bool], jax.Array] = functional.gelu
    attention: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] = attention


PLAIN = Hooks()
