"""summary.json: the last value of each metric of a run, and its environment."""

import json
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

import jax
from etils import epath

import mae_dist
from mae_dist.errors import StorageFault
from mae_dist.metrics.recorder import without_nan
from mae_dist.revision import commit
from mae_dist.storage import read_text, storage_errors, write_text_atomically

SUMMARY_FILE = "summary.json"


def last_values(records: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Returns the last value of each name.

    Values of single classes (`val_top1/<class>`) are of the split's last evaluation only: of many classes each
    evaluation records its own lowest, so others would be of earlier evaluations.
    """
    last: dict[str, float] = {}
    for record in records:
        renewed = tuple({name.partition("/")[0] + "/" for name in record if "/" in name})
        last = {name: value for name, value in last.items() if not name.startswith(renewed)} | dict(record)
    return last


def read_summary(workdir: epath.Path) -> dict[str, Any]:
    """Returns summary.json, the result of a finished run; {} before.

    Raises:
      StorageFault: the file cannot be read, or is corrupted.
    """
    path = workdir / SUMMARY_FILE
    with storage_errors(path):
        text = read_text(path)
    try:
        return dict(json.loads(text or "{}"))
    except (ValueError, TypeError) as error:
        raise StorageFault(
            f"{path} is corrupted: {error}; delete it, and the run's own command writes it again"
        ) from error


def write_summary(workdir: epath.Path, summary: Mapping[str, Any]) -> None:
    """Writes summary.json atomically; values that are not finite become null."""
    path = workdir / SUMMARY_FILE
    with storage_errors(path):
        text = json.dumps(without_nan(summary), indent=2, allow_nan=False)
        write_text_atomically(path, text + "\n")


def environment() -> dict[str, str | int]:
    """Returns the versions and devices that a result depends on."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
    return {
        "mae_dist": mae_dist.__version__,
        **({"commit": found} if (found := commit()) else {}),
        "python": platform.python_version(),
        **{name.replace("-", "_"): version(name) for name in packages},
        "platform": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
    }
