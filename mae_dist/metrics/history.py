"""Checks, before a start writes anything, that it does not replace a run's records by fewer.

A run that was killed before its first save begins anew by the same command, because it records the same again. Wherever
records would be lost for good the start is refused, and the result of a shorter run is kept beside that of the longer.
"""

import json
from typing import Any

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from mae_dist import config as config_lib
from mae_dist.checkpoint.manifests import Manifests
from mae_dist.errors import StorageFault
from mae_dist.metrics.recorder import METRICS_FILE, read_metrics
from mae_dist.metrics.summary import SUMMARY_FILE
from mae_dist.storage import read_text, storage_errors


def check_start(workdir: epath.Path, config: ConfigDict, start: int, total_steps: int) -> None:
    """Raises a `StorageFault` if a start would replace records by fewer, and logs missing ones.

    Args:
      workdir: the run's directory.
      config: of this start.
      start: the step of the checkpoint that it continues from, 0 for none.
      total_steps: the last step of the run.
    """
    if start > total_steps:
        raise StorageFault(
            f"{workdir} is trained to step {start} already, beyond total_steps={total_steps}: nothing is done or "
            f"changed. Set total_steps={start} or more (or total_epochs accordingly), or choose another --workdir"
        )
    with storage_errors(workdir):
        if start == 0:
            _check_beginning(workdir, config)
        elif _last_step(workdir) < start - start % config.log_every_steps:
            logging.warning(
                "%s ends at step %d and the checkpoint is of step %d: the records between them are lost",
                *(workdir / METRICS_FILE, _last_step(workdir), start),
            )


def _check_beginning(workdir: epath.Path, config: ConfigDict) -> None:
    """Does the same as `check_start`, where there is no checkpoint."""
    cure = (
        f"choose another --workdir for a new run; to begin anew in this one, move {workdir} away or delete it, records "
        "and all"
    )
    saved, summary = Manifests(workdir).steps(), workdir / SUMMARY_FILE
    evidence = [f"saved step {step}" for step in saved[-1:]] + [f"left {summary.name}"] * summary.exists()
    if evidence:
        raise StorageFault(
            f"{workdir / 'checkpoints'} is empty, but the run there has {' and '.join(evidence)}: it would be replaced "
            f"by one from the beginning. Restore the checkpoints from a copy and repeat the command; or {cure}"
        )
    last = _last_step(workdir)
    if not last:
        return
    try:
        stored = config_lib.from_json(read_text(workdir / "config.json"), for_use=False)
        lines = config_lib.differences(stored, config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        lines = [f"its config.json cannot be read: {error}"]
    if lines:
        raise StorageFault(
            f"{workdir} holds the records of another configuration, to step {last}, which has not saved yet:\n  - "
            + "\n  - ".join(lines)
            + f"\nSet these back to begin that run anew; or {cure}"
        )
    logging.warning("The run here was ended at step %d, before its first save: it begins anew, by the same steps", last)


def finished_summary(workdir: epath.Path, step: int) -> dict[str, Any] | None:
    """Returns summary.json if it is of a run that ended at `step`; None if it is to be made from the records.

    Raises:
      StorageFault: there is none, and the records do not reach `step`.
    """
    path = workdir / SUMMARY_FILE
    with storage_errors(path):
        text = read_text(path)
    try:
        summary = json.loads(text)
        if summary["step"] == summary["total_steps"] == step:
            return summary
    except (ValueError, KeyError, TypeError):
        pass  # corrupted, or not there
    if _last_step(workdir) < step:
        raise StorageFault(
            f"{workdir} is trained to step {step}, but {METRICS_FILE} ends at step {_last_step(workdir)}, so "
            f"its result cannot be written. Restore {METRICS_FILE} or {path.name} from a copy; the checkpoint "
            "is whole, and other commands can use it"
        )
    return None


def _last_step(workdir: epath.Path) -> int:
    """Returns the last step in metrics.jsonl, 0 without records."""
    records = read_metrics(workdir)
    return int(records[-1]["step"]) if records else 0
