"""Results of finished runs, and their mean and deviation over seeds."""

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence

from etils import epath
from ml_collections import ConfigDict

from mae_dist import config as config_lib
from mae_dist.errors import ConfigError, StorageFault
from mae_dist.metrics.summary import SUMMARY_FILE
from mae_dist.storage import read_text, storage_errors

# The metrics of a summary that are of whole splits, in the order of tables. An accuracy is a fraction, 0 to 1.
METRICS = (
    "val_loss",
    "test_loss",
    "val_knn_top1",
    "test_knn_top1",
    "val_ridge_top1",
    "test_ridge_top1",
    "train_top1",
    "val_top1",
    "test_top1",
)


@dataclasses.dataclass(frozen=True)
class Result:
    """Config of a finished run, and the last values of those of `METRICS` that it has."""

    config: ConfigDict
    metrics: dict[str, float]


def read_result(workdir: epath.Path) -> Result | None:
    """Returns the result in a workdir; None if its run is not there or not finished.

    Raises:
      StorageFault: the workdir cannot be read, or its files are corrupted.
    """
    with storage_errors(workdir):
        texts = [read_text(workdir / name) for name in ("config.json", SUMMARY_FILE)]
    if not all(texts):
        return None
    try:
        summary = json.loads(texts[1])
        if summary["step"] != summary["total_steps"]:
            return None
        found = {name: summary[name] for name in METRICS if summary.get(name) is not None}
        return Result(config_lib.from_json(texts[0]), found)
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageFault(
            f"config.json or {SUMMARY_FILE} in {workdir} is corrupted: {error}; delete {SUMMARY_FILE}, and the run's "
            "own command writes both again"
        ) from error


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1; NaN for one seed) of a metric over seeds."""

    mean: float
    std: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + (f" ± {self.std:.4f}" if self.count > 1 else "")


def spread(values: Sequence[float]) -> Spread:
    """Returns mean and sample standard deviation of at least one value."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan, len(values))
