"""Masked autoencoders in JAX, from one CPU to a TPU pod: sharded, resumable, measured.

`mae_dist.load_encoder(path)` gives a trained encoder to compute features with; everything else is commands.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mae_dist.encoder import load_encoder

__all__ = ["load_encoder"]


def __getattr__(name: str) -> Any:
    """Imports JAX only when it is needed: a typo on a command line is told before."""
    if name == "load_encoder":
        from mae_dist.encoder import load_encoder

        return load_encoder
    raise AttributeError(f"module 'mae_dist' has no attribute {name!r}; it offers {', '.join(__all__)}")
