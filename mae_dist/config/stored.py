"""Configs as text, their fields by dotted name, and the differences between two."""

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from mae_dist import names
from mae_dist.config import default
from mae_dist.config.imports import import_modules
from mae_dist.task_kinds import TASK_KINDS

# What may differ between a checkpoint and the config that continues it: how and where the run is carried out, not what
# it computes.
FREE = (
    "name",
    "imports",
    "compiled_step",
    "cpu",
    "mesh",
    "accum_steps",
    "log_every_steps",
    "max_skipped_steps",
    "total_steps",
    "total_epochs",
    "model.scan",
    "model.remat",
    "optim.shard_state",
    "optim.grad_exchange",
    "data.data_dir",
    "data.cache",
    "data.cache_dir",
    "data.stage",
    "data.accept_changes",
    "data.num_workers",
    "eval",
    "online",
    "pictures",
    "checkpoint",
    "deadlines",
    "trace",
    "trackers",
    "profile_steps",
)


def get(config: ConfigDict, field: str) -> Any:
    """Returns the value at a dotted path."""
    value: Any = config
    for part in field.split("."):
        value = value[part]
    return value


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted path, value) of every leaf; tuples as lists, as in JSON."""
    for key in sorted(config):
        value = config[key]
        if isinstance(value, (dict, ConfigDict)):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def to_json(config: ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def from_json(text: str, *, for_use: bool = True) -> ConfigDict:
    """Returns a config as stored by `to_json`, with fields added since then at their default.

    Imports the modules of its `imports`, unless it is not for use, but for comparison with another.

    Raises:
      ConfigError: such a module cannot be imported, or the task is unknown without one.
      ValueError, KeyError, TypeError, AttributeError: `text` is no such config.
    """
    config = default.get_config()
    with config.ignore_type():
        for field, value in flatten(json.loads(text)):
            section, _, key = field.rpartition(".")
            target = get(config, section) if section else config
            if key in target:
                target[key] = tuple(value) if isinstance(value, list) else value
    if for_use:
        import_modules(config.imports)
        TASK_KINDS.get(config.task)
    return config.lock()


def last_name(path: str) -> str:
    """Returns the name of a directory or file, which still identifies weights that were moved."""
    return os.path.basename(names.with_revision(path, "").rstrip("/"))


def _on_hub(path: str) -> bool:
    return path.startswith(names.HUB)


def differences(old: Any, new: Any, ignore: Sequence[str] = FREE) -> list[str]:
    """Returns a line `field: old -> new` for every leaf that differs, except below the fields in `ignore`."""
    before, after = dict(flatten(old)), dict(flatten(new))
    lines = []
    for field in sorted(before.keys() | after.keys()):
        ignored = any(field == name or field.startswith(f"{name}.") for name in ignore)
        a, b = before.get(field, "(absent)"), after.get(field, "(absent)")
        if field == "init_from" and last_name(a) == last_name(b) and not (_on_hub(a) and _on_hub(b)):
            continue  # the weights may have been moved since
        if field == "init_commit" and not b:
            continue  # the run finds it
        if not ignored and a != b:
            lines.append(f"{field}: {a!r} -> {b!r}")
    return lines


# Fields that only a pretraining uses; trainings that follow inherit them.
MASKING = ("model.masking", "model.mask_ratio", "model.mask_file", "model.mask_block")
