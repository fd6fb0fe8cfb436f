"""Patch features as colours: their first three principal components as red, green and blue.

Shapes: n images, (gh, gw) grid of patches, D width.
"""

import numpy as np

_RANGE = (1, 99)  # percentiles of a component that become 0 and 1


def patch_colours(features: np.ndarray, patch_size: tuple[int, int] = (1, 1)) -> np.ndarray:
    """Colours patches by the principal components of all patches of all images; similar patches get similar colours.

    The sign of a component is such that its largest weight is positive, so that equal features give equal pictures.

    Args:
      features: of patches, float32 (n, gh, gw, D).
      patch_size: (height, width) of each in the result, in pixels.

    Returns:
      float32 (n, gh * height, gw * width, 3) in 0..1; gray where features are equal, or not finite after a divergence.
    """
    colours = np.full((*features.shape[:3], 3), 0.5, np.float32)
    if features.size and np.isfinite(features).all():
        centered = features.reshape(-1, features.shape[-1]).astype(np.float64)
        centered -= centered.mean(axis=0)
        _, vectors = np.linalg.eigh(centered.T @ centered)  # (D, D), ascending
        axes = vectors[:, ::-1][:, :3]
        axes = axes * np.sign(np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], axis=0))
        components = centered @ axes
        low, high = np.percentile(components, _RANGE, axis=0)
        known = high - low > 1e-9 * np.abs(centered).max()  # else there are rounding errors alone
        scaled = np.where(known, (components - low) / np.where(known, high - low, 1), 0.5)
        colours[..., : axes.shape[1]] = np.clip(scaled, 0, 1).reshape(*features.shape[:3], -1)
    return colours.repeat(patch_size[0], axis=1).repeat(patch_size[1], axis=2)
