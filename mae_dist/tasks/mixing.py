"""Random erasing, mixup and cutmix on the device, drawn for every example separately.

Each example has its own key, so its draws do not depend on devices, microbatches or accumulation. Rows 2i and 2i + 1 of
a batch are mixed with each other: the global batch is shuffled, so these are random pairs, and both are on one device.
Code that splits a batch must keep such pairs together.

Shapes: B examples, H W C image, Y classes.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

# Random erasing (Zhong et al. 2017) with timm's ranges: area and aspect ratio of one box, and the tries until it fits.
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_ASPECT = 1 / 0.3
_TRIES = 10


def neighbour(x: Shaped[Array, "B *rest"]) -> Shaped[Array, "B *rest"]:
    """Swaps rows 2i and 2i + 1."""
    return x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)


def _box(
    size: tuple[int, int], top: jax.Array, left: jax.Array, bottom: jax.Array, right: jax.Array
) -> Bool[Array, "H W"]:
    """Returns True for the pixels of an image that are in a box."""
    rows, columns = jnp.arange(size[0])[:, None], jnp.arange(size[1])[None]
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


def erase(images: Float[Array, "B H W C"], keys: Key[Array, "B"], prob: float) -> Float[Array, "B H W C"]:
    """Fills a box with normal noise, in each scaled image with probability `prob`."""

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        height, width, _ = image.shape
        whether, area_key, aspect_key, place_key, noise_key = jax.random.split(key, 5)
        low, high = _ERASED_AREA
        areas = height * width * jax.random.uniform(area_key, (_TRIES,), minval=low, maxval=high)
        limit = math.log(_ERASED_ASPECT)
        aspects = jnp.exp(jax.random.uniform(aspect_key, (_TRIES,), minval=-limit, maxval=limit))
        heights = jnp.round(jnp.sqrt(areas * aspects)).astype(jnp.int32)
        widths = jnp.round(jnp.sqrt(areas / aspects)).astype(jnp.int32)
        fits = (heights < height) & (widths < width)
        sizes = jnp.stack([heights, widths])[:, jnp.argmax(fits)]  # of the first try that fits
        top, left = jax.random.randint(place_key, (2,), 0, jnp.array([height, width]) - sizes + 1)
        erased = _box((height, width), top, left, top + sizes[0], left + sizes[1])
        erased &= fits.any() & (jax.random.uniform(whether) < prob)
        return jnp.where(erased[..., None], jax.random.normal(noise_key, image.shape), image)

    return jax.vmap(one)(images, keys)


def mix(
    images: Float[Array, "B H W C"],
    keys: Key[Array, "B"],
    *,
    mixup: float,
    cutmix: float,
    prob: float,
    switch_prob: float,
) -> tuple[Float[Array, "B H W C"], Float[Array, "B"]]:
    """Mixes every image with its neighbour, by mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019).

    Args:
      images: scaled pixels, B even.
      keys: one per example.
      mixup: alpha of mixup's weight ~ Beta(alpha, alpha); 0: no mixup.
      cutmix: alpha of cutmix's area ~ Beta(alpha, alpha); 0: no cutmix.
      prob: probability that an example is mixed at all.
      switch_prob: probability of cutmix instead of mixup, where both are on.

    Returns:
      The mixed images, and each example's own weight in its mixture: for cutmix the fraction of its pixels.
    """
    size = (images.shape[1], images.shape[2])
    switch = switch_prob if mixup and cutmix else float(cutmix > 0)

    def own_weight(key: Key[Array, ""]) -> Float[Array, "H W"]:
        """Returns the weight of each of an example's own pixels in its mixture."""
        whether, which, weight_key, place_key = jax.random.split(key, 4)
        is_cutmix = jax.random.uniform(which) < switch
        alpha = jnp.where(is_cutmix, cutmix or 1.0, mixup or 1.0)  # 1 for the one that is off, and so never chosen
        weight = jax.random.beta(weight_key, alpha, alpha)
        # A box of the other example's area around a random pixel, clipped at the borders.
        sides = jnp.floor(jnp.sqrt(1 - weight) * jnp.array(size, jnp.float32)).astype(jnp.int32)
        start = jax.random.randint(place_key, (2,), 0, jnp.array(size)) - sides // 2
        top, left = jnp.maximum(start, 0)
        # Even sides, as in timm up to 1.0.28, which the paper used; from 1.0.30 on a side may be odd.
        bottom, right = start + sides // 2 * 2
        own = jnp.where(is_cutmix, 1 - _box(size, top, left, bottom, right).astype(jnp.float32), weight)
        return jnp.where(jax.random.uniform(whether) < prob, own, 1.0)

    own = jax.vmap(own_weight)(keys)[..., None]  # (B, H, W, 1)
    return images * own + neighbour(images) * (1 - own), own.mean(axis=(1, 2, 3))


def mix_labels(
    labels: Int[Array, "B"], weight: Float[Array, "B"], num_classes: int
) -> tuple[Float[Array, "B Y"], Int[Array, "B"]]:
    """Returns the soft labels of mixed images and the label with the larger weight; `weight` is `mix`'s own weight."""
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    soft = one_hot * weight[:, None] + neighbour(one_hot) * (1 - weight)[:, None]
    return soft, jnp.where(weight >= 0.5, labels, neighbour(labels))
