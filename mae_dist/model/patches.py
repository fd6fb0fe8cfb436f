"""Cuts images into patches and puts them together again.

Shapes: B batch, H W C image, L patches, K kept patches, P values of one patch (ph * pw * C), D width, (gh, gw) grid.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from mae_dist.errors import ConfigError


def grid_size(image_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """Returns (gh, gw), the number of patches down and across; `ConfigError` if the patch does not divide the image."""
    for name, size, patch in zip(("height", "width"), image_size, patch_size, strict=True):
        if patch < 1 or size % patch:
            fits = [d for d in range(1, size + 1) if size % d == 0]
            nearest = min(fits, key=lambda d: abs(d - patch))
            raise ConfigError(
                f"model.patch_size {patch} does not divide the image {name} {size} (model.image_size); "
                f"nearest that does: {nearest}"
            )
    return image_size[0] // patch_size[0], image_size[1] // patch_size[1]


def patchify(images: Shaped[Array, "B H W C"], patch_size: tuple[int, int]) -> Shaped[Array, "B L P"]:
    """Returns the patches of images in raster order, each flattened as (row, column, channel)."""
    b, h, w, c = images.shape
    ph, pw = patch_size
    gh, gw = grid_size((h, w), patch_size)
    x = images.reshape(b, gh, ph, gw, pw, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, gh * gw, ph * pw * c)


def unpatchify(
    patches: Shaped[Array, "B L P"], image_size: tuple[int, int], patch_size: tuple[int, int]
) -> Shaped[Array, "B H W C"]:
    """Returns the images of patches: the inverse of `patchify`."""
    b, _, p = patches.shape
    ph, pw = patch_size
    gh, gw = grid_size(image_size, patch_size)
    x = patches.reshape(b, gh, gw, ph, pw, p // (ph * pw))
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, gh * ph, gw * pw, p // (ph * pw))


def take_patches(x: Float[Array, "B L D"], ids: Int[Array, "B K"]) -> Float[Array, "B K D"]:
    """Gathers the patches `ids` of each example."""
    return jnp.take_along_axis(x, ids[:, :, None], axis=1)
