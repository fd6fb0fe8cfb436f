"""What is trained: pretraining, probing and fine-tuning, each as one `Task` value for the one loop.

Shapes: B batch, H W C image, L patches, P values of one patch, D encoder width, Y classes. A batch holds `image` uint8
(B, H, W, C) or, for a probe on cached features, `features` float32 (B, D); `label` int32 (B,); in evaluation also
`index` int32 (B,), the example's place in its split, and `weight` float32 (B,), 0 for padding. `seed` uint32 (B,), the
same in every row, is that of fixed masks, so that another one compiles nothing new; without it that of the config.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics

from mae_dist.model.build import Params

Batch = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Task:
    """Model, loss and metrics of one kind of training.

    abstract_params: the shapes of the parameters, by group.
    init_params: key -> parameters.
    loss: (params, batch, keys (B,)) -> (loss of each example (B,), further per-example metrics (B,)); integers among
      them are summed, modulo their size, where others are averaged.
    evaluate: (params, batch) -> clu metrics, to be merged over batches.
    frozen: top-level parameter groups that are not trained.
    features: (params, batch) -> pooled features (B, D) of whole images by the encoder, where it is asked for them.
    reconstruct: (params, batch) -> pictures, see `make_pictures`.
    rows_together: so many rows of a batch, one after another, are needed at once by `loss`.
    statistics: (params, batch) -> new values of frozen groups. Where there is one, it and `loss` are given all of an
      update's examples at once, on whatever devices, and as `features`.
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


def scale_pixels(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """uint8 (B, H, W, C) -> float32 (pixel / 255 - mean) / std; mean and std have one value or one per channel."""
    return (images.astype(jnp.float32) / 255 - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def unscale_pixels(x: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """The inverse of `scale_pixels`, to values in 0..1 (clipped)."""
    return jnp.clip(x * jnp.asarray(std, jnp.float32) + jnp.asarray(mean, jnp.float32), 0, 1)
