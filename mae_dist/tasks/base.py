"""The `Task` value: model, loss and metrics of one kind of training, for the one loop.

Shapes: B batch, H W C image, L patches, P values of one patch, D encoder width, Y classes. A batch holds `image`
(B, H, W, C) uint8, uint16 or float32 or, for a probe on cached features, `features` float32 (B, D); `label` int32
(B,), -1 for none; in evaluation also `index` int32 (B,), the example's position in its split, `weight` float32 (B,), 0
for padding, and optionally `seed` uint32 (B,), the same in every row: the seed of the fixed masks, by default the
config's. It is data, so that another seed compiles nothing.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics
from jaxtyping import Array, Float, Num
from ml_collections import ConfigDict

from mae_dist.model.build import Params

Batch = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Task:
    """Model, loss and metrics of one kind of training.

    abstract_params: the parameters' shapes, by group.
    init_params: key -> parameters.
    loss: (params, batch, keys (B,)) -> (loss of each example (B,), further per-example metrics (B,)); integer metrics
      are summed (modulo 2^32), others averaged.
    evaluate: (params, batch) -> clu metrics, to be merged over batches.
    frozen: top-level parameter groups that are not trained.
    features: (params, batch) -> the encoder's pooled features (B, D) of whole images.
    reconstruct: (params, batch) -> pictures, see `make_pictures`.
    rows_together: consecutive rows of a batch that must stay on one device (2 for mixup and cutmix pairs).
    statistics: (params, batch) -> new values of frozen groups. With it, `statistics` and `loss` get all examples of a
      step at once, on any devices, as `features`.
    """

    name: str
    abstract_params: Params
    init_params: Callable[[jax.Array], Params]
    loss: Callable[[Params, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
    evaluate: Callable[[Params, Batch], dict[str, clu_metrics.Metric]]
    frozen: tuple[str, ...] = ()
    features: Callable[[Params, Batch], jax.Array] | None = None
    reconstruct: Callable[[Params, Batch], dict[str, jax.Array]] | None = None
    rows_together: int = 1
    statistics: Callable[[Params, Batch], Params] | None = None


def scale_pixels(images: Num[Array, "B H W C"], data: ConfigDict) -> Float[Array, "B H W C"]:
    """Scales pixels as a model takes them: (fraction - mean) / std in float32.

    Args:
      images: uint8, uint16, or floating-point fractions of the range.
      data: `config.data`: `max_value` is the top of uint16's range; `mean` and `std` have one value or C.
    """
    fraction = images.astype(jnp.float32)
    if images.dtype == jnp.uint8:
        fraction = fraction / 255
    elif images.dtype == jnp.uint16:
        fraction = fraction / (data.max_value or 65535)
    return (fraction - jnp.asarray(data.mean, jnp.float32)) / jnp.asarray(data.std, jnp.float32)


def unscale_pixels(x: Float[Array, "B H W C"], data: ConfigDict) -> Float[Array, "B H W C"]:
    """Inverts `scale_pixels`, to fractions of the range; not clipped."""
    return x * jnp.asarray(data.std, jnp.float32) + jnp.asarray(data.mean, jnp.float32)
