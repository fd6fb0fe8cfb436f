"""The functions that a platform may replace in a model; up to rounding the results are the same.

A module is given one `Hooks` and calls its functions. The default is plain JAX, which supports every transformation,
forward mode included. `mae_dist/platforms.py` chooses.
"""

import dataclasses
from collections.abc import Callable

import jax

from mae_dist.model import functional
from mae_dist.model.attention import attention


@dataclasses.dataclass(frozen=True)
class Hooks:
    """Functions that a model's modules call.

    Attributes:
      constrain: (array, logical axes) -> array; constrains an activation's sharding. Models know logical axes, no mesh.
      affine: as `functional.affine`.
      gelu: as `jax.nn.gelu`.
      attention: as `attention.attention`.
    """

    constrain: Callable[[jax.Array, tuple[str | None, ...]], jax.Array] = lambda x, axes: x
    affine: Callable[[jax.Array, jax.Array, jax.Array | None, int], jax.Array] = functional.affine
    gelu: Callable[[jax.Array, bool], jax.Array] = jax.nn.gelu
    attention: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] = attention


PLAIN = Hooks()
