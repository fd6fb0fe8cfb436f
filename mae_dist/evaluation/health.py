"""Figures of features that need no labels: do they still tell images apart?"""

import logging

import numpy as np

_DEAD = 0.01  # standard deviation of a dimension, relative to the root mean square of all values
_COLLAPSED_RANK, _COLLAPSED_SHARE = 2.0, 0.5
_LOG = logging.getLogger(__name__)


def health(features: np.ndarray) -> dict[str, float]:
    """Returns how much of their width features use; warns if next to nothing.

    Args:
      features: (N, D).

    Returns:
      `rank`: the effective rank, 1 to min(N, D) (RankMe, Garrido et al. 2023: the exponential of the entropy of the
      singular values). `feature_std`: standard deviation over images, mean over dimensions. `dead_share`: the fraction
      of dimensions that hardly differ between images.
    """
    x = features.astype(np.float64)
    gram = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T
    singular = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0))
    p = singular / max(singular.sum(), np.finfo(np.float64).tiny)
    p = p[p > 0]
    std, scale = x.std(axis=0), np.sqrt(np.square(x).mean())
    found = {
        "rank": float(np.exp(-(p * np.log(p)).sum())),
        "feature_std": float(std.mean()),
        "dead_share": float(np.mean(std <= _DEAD * scale)),
    }
    if len(x) > 1 and (found["rank"] < _COLLAPSED_RANK or found["dead_share"] > _COLLAPSED_SHARE):
        _LOG.warning(
            "THE ENCODER HAS COLLAPSED, or has not learned anything yet: effective rank %.2f of %d, %.0f %% of the "
            "features' dimensions hardly differ between images. If that stays, lower optim.base_lr or mask less",
            *(found["rank"], min(x.shape), 100 * found["dead_share"]),
        )
    return found
