"""A run's config: every field and its default, checks, epochs as steps, and configs as they are stored.

`default` and `stored` need `ml_collections` alone; the checks, which know the model's choices, import JAX when first
used.
"""

from typing import TYPE_CHECKING, Any

from mae_dist.config.named import get_config
from mae_dist.config.schedule import Schedule, is_time, rows_together, schedule
from mae_dist.config.stored import FREE, MASKING, differences, flatten, from_json, get, last_name, to_json
from mae_dist.errors import nearest

if TYPE_CHECKING:
    from mae_dist.config.checks import ONLINE, parse_steps, validate, validate_model
    from mae_dist.config.fields import CHOICES, field_faults

__all__ = [
    "CHOICES",
    "FREE",
    "MASKING",
    "ONLINE",
    "Schedule",
    "differences",
    "field_faults",
    "flatten",
    "from_json",
    "get",
    "get_config",
    "is_time",
    "last_name",
    "nearest",
    "parse_steps",
    "rows_together",
    "schedule",
    "to_json",
    "validate",
    "validate_model",
]


def __getattr__(name: str) -> Any:
    """Imports the checks, and JAX with them, when they are needed."""
    if name in __all__:
        from mae_dist.config import checks, fields

        return getattr(fields if name in ("CHOICES", "field_faults") else checks, name)
    raise AttributeError(f"module 'mae_dist.config' has no attribute {name!r}; it offers {', '.join(__all__)}")
