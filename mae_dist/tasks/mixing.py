"""Random erasing, mixup and cutmix on the device, drawn for every example by itself.

All randomness comes from one key per example, so a draw does not depend on devices, pieces or accumulation. An example
is mixed with its neighbour, rows 2i and 2i + 1 of a batch: the global batch is shuffled, so these are random pairs, and
they lie on one device. Whoever splits a batch must leave such pairs together.

Shapes: B examples, H W C image, Y classes.
"""

import functools
import math

import jax
import jax.numpy as jnp

# Random erasing (Zhong et al. 2017) as timm draws it: one box, its area and aspect ratio, and tries until one fits.
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_ASPECT = 1 / 0.3
_TRIES = 10


def neighbour(x: jax.Array) -> jax.Array:
    """x (B, ...) with rows 2i and 2i + 1 swapped."""
    return x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)


def _box(size: tuple[int, int], top: jax.Array, left: jax.Array, bottom: jax.Array, right: jax.Array) -> jax.Array:
    """Which pixels of an image lie in a box: bool (H, W)."""
    rows, columns = jnp.arange(size[0])[:, None], jnp.arange(size[1])[None]
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


def erase(images: jax.Array, keys: jax.Array, prob: float) -> jax.Array:
    """Fills a box in a share `prob` of the images with normal noise: scaled pixels (B, H, W, C), keys (B,)."""

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
    images: jax.Array, keys: jax.Array, *, mixup: float, cutmix: float, prob: float, switch_prob: float
) -> tuple[jax.Array, jax.Array]:
    """Mixes every image with its neighbour: by mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019).

    Args:
      images: scaled pixels (B, H, W, C), B even.
      keys: one per example (B,).
      mixup: alpha of mixup's share ~ Beta(alpha, alpha); 0: no mixup.
      cutmix: alpha of cutmix's share; 0: no cutmix.
      prob: share of the examples that are mixed at all.
      switch_prob: share of cutmix among them where there are both.

    Returns:
      The mixed images, and the share (B,) of each that is its own: for cutmix that of the pixels.
    """
    _, height, width, _ = images.shape
    switch = switch_prob if mixup and cutmix else float(cutmix > 0)
    draw = functools.partial(
        _own_weight, size=(height, width), mixup=mixup, cutmix=cutmix, prob=prob, switch_prob=switch
    )
    own = jax.vmap(draw)(keys)[..., None]  # (B, H, W, 1)
    return images * own + neighbour(images) * (1 - own), own.mean(axis=(1, 2, 3))


def _own_weight(
    key: jax.Array, *, size: tuple[int, int], mixup: float, cutmix: float, prob: float, switch_prob: float
) -> jax.Array:
    """The weight of an example's own pixels in its mixture: float32 (H, W)."""
    whether, which, share_key, place_key = jax.random.split(key, 4)
    is_cutmix = jax.random.uniform(which) < switch_prob
    alpha = jnp.where(is_cutmix, cutmix or 1.0, mixup or 1.0)  # of what is never drawn there is none
    share = jax.random.beta(share_key, alpha, alpha)
    # A box of the rest's area around any pixel, cut off at the borders.
    sides = jnp.floor(jnp.sqrt(1 - share) * jnp.array(size, jnp.float32)).astype(jnp.int32)
    start = jax.random.randint(place_key, (2,), 0, jnp.array(size)) - sides // 2
    top, left = jnp.maximum(start, 0)
    # Even sides, as those of timm's box, which the paper used, up to its version 1.0.28; in 1.0.30 a side may be odd.
    bottom, right = start + sides // 2 * 2
    own = jnp.where(is_cutmix, 1 - _box(size, top, left, bottom, right).astype(jnp.float32), share)
    return jnp.where(jax.random.uniform(whether) < prob, own, 1.0)


def mix_labels(labels: jax.Array, share: jax.Array, num_classes: int) -> tuple[jax.Array, jax.Array]:
    """Of mixed images: labels (B,) and own shares (B,) -> soft labels (B, Y), and the label (B,) of the larger part."""
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    soft = one_hot * share[:, None] + neighbour(one_hot) * (1 - share)[:, None]
    return soft, jnp.where(share >= 0.5, labels, neighbour(labels))
