"""Re-exports `mae_dist/config/default.py`: every field with its default, which the other files change."""

from mae_dist.config.default import get_config

__all__ = ["get_config"]
