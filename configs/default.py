"""Every field with its default: `mae_dist/config/default.py`. The other files change it."""

from mae_dist.config.default import get_config

__all__ = ["get_config"]
