"""The end of a run: summary.json and the one line of result."""

import math
import statistics
from typing import Any

from etils import epath

from mae_dist import config as config_lib
from mae_dist import errors
from mae_dist.metrics import goodput, history
from mae_dist.metrics.recorder import read_metrics
from mae_dist.metrics.summary import SUMMARY_FILE, environment, last_values, write_summary
from mae_dist.parallel import processes
from mae_dist.storage import naming_faults, set_aside
from mae_dist.training.job import Job


def finish(job: Job, workdir: epath.Path, step: int) -> int:
    """Writes summary.json from metrics.jsonl, unless it is there, and prints the one line of result."""
    if not processes.is_primary():
        return errors.EXIT_DONE
    summary = history.finished_summary(workdir, step)
    if summary is None:
        summary = _summary(job, workdir, step)
        with naming_faults(workdir):
            set_aside(workdir / SUMMARY_FILE)
        write_summary(workdir, summary)
    accuracies = ("val_top1", "test_top1", *config_lib.ONLINE, "test_knn_top1", "test_ridge_top1")
    shown = ("loss", "val_loss", "test_loss", *accuracies, "images_per_sec")
    values = ", ".join(f"{name} {summary[name]:.4g}" for name in shown if summary.get(name) is not None)
    print(f"{job.config.name}: step {step} of {job.schedule.total_steps}, {values} ({workdir})", flush=True)
    return errors.EXIT_DONE


def _summary(job: Job, workdir: epath.Path, step: int) -> dict[str, Any]:
    """What summary.json says of the run."""
    records = read_metrics(workdir)
    rates = [record["images_per_sec"] for record in records if math.isfinite(record.get("images_per_sec", math.nan))]
    timing = ("step_secs", "eta_secs", "images_per_sec", "data_wait", "mfu")
    return {
        "name": job.config.name,
        "task": job.config.task,
        "step": step,
        "total_steps": job.schedule.total_steps,
        **{name: value for name, value in last_values(records).items() if name not in ("step", *timing)},
        "images_per_sec": statistics.median(rates) if rates else None,
        "goodput": goodput.summarize(workdir),
        "environment": environment(),
    }
