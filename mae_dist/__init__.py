"""Masked autoencoders in JAX, from one CPU to a TPU pod: sharded, resumable, measured.

`get_config(name)` returns one of the configs that come with the package, `default_config()` every field with its
default; `load_encoder(path)` gives a trained encoder to compute features with.
"""

from typing import TYPE_CHECKING, Any

from mae_dist.config.default import get_config as default_config
from mae_dist.config.named import get_config

if TYPE_CHECKING:
    from mae_dist.evaluation.encoder import load_encoder
    from mae_dist.model import masking

__all__ = ["default_config", "get_config", "load_encoder", "masking"]


def __getattr__(name: str) -> Any:
    """Imports JAX only when it is needed: a typo on a command line is told before."""
    if name == "load_encoder":
        from mae_dist.evaluation.encoder import load_encoder

        return load_encoder
    if name == "masking":
        from mae_dist.model import masking

        return masking
    raise AttributeError(f"module 'mae_dist' has no attribute {name!r}; it offers {', '.join(__all__)}")
