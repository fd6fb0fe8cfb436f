"""The end of a run: summary.json and the result."""

import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import Literal

from etils import epath

from mae_dist.metrics import goodput, history
from mae_dist.metrics.recorder import read_metrics
from mae_dist.metrics.summary import SUMMARY_FILE, environment, last_values, write_summary
from mae_dist.parallel import processes
from mae_dist.storage import set_aside, storage_errors
from mae_dist.training.job import Job

_NOT_METRICS = ("name", "task", "step", "total_steps", "goodput", "environment")


@dataclasses.dataclass(frozen=True)
class Result:
    """The end of a training.

    Attributes:
      step: the last step of the run.
      status: "done", or "preempted": saved at `step`, and the same call continues.
      metrics: the last value of each metric, as in summary.json (`loss`, `val_loss`, …), NaN where it is not finite.
        Only process 0 has them, and only of a run that is done.
    """

    step: int
    status: Literal["done", "preempted"]
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)


def finish(job: Job, workdir: epath.Path, step: int) -> Result:
    """Writes summary.json from metrics.jsonl, unless it is there."""
    if not processes.is_primary():
        return Result(step, "done")
    summary = history.finished_summary(workdir, step)
    if summary is None:
        records = read_metrics(workdir)
        rates = [rate for record in records if math.isfinite(rate := record.get("images_per_sec", math.nan))]
        timing = ("step_secs", "eta_secs", "images_per_sec", "data_wait", "mfu")
        summary = {
            "name": job.config.name,
            "task": job.config.task,
            "step": step,
            "total_steps": job.schedule.total_steps,
            **{name: value for name, value in last_values(records).items() if name not in ("step", *timing)},
            "images_per_sec": statistics.median(rates) if rates else None,
            "goodput": goodput.summarize(goodput.read_starts(workdir)),
            "environment": environment(),
        }
        with storage_errors(workdir):
            set_aside(workdir / SUMMARY_FILE)
        write_summary(workdir, summary)
    metrics = {name: value for name, value in summary.items() if name not in _NOT_METRICS}
    return Result(step, "done", {name: math.nan if value is None else value for name, value in metrics.items()})
