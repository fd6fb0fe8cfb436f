"""Writing and reading of a run's metrics: metrics.jsonl and TensorBoard events.

metrics.jsonl holds one JSON object per recorded step, in ascending order of `step`. Numbers round-trip exactly; JSON
has no NaN, so a value that is not finite is written as null and read back as NaN.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from mae_dist.errors import StorageFault
from mae_dist.metrics.tensorboard import TensorBoardWriter, metric_writers
from mae_dist.storage import JsonLines, read_json_lines, storage_errors

METRICS_FILE = "metrics.jsonl"
_WHAT = "record of a step"

OnRecord = Callable[[dict[str, float]], object]


class Recorder:
    """Records a run's metrics, each step at most once, also across restarts.

    Drops what an earlier process recorded beyond the checkpoint that this one continues from (and a last line that was
    cut short), so that after any number of restarts the file equals that of one uninterrupted run.

    Args:
      workdir: the run's directory, made if it does not exist.
      start_step: the step of the restored checkpoint; lines beyond it are dropped. 0 is a run from its beginning, with
        nothing restored: all lines are dropped, so that it may record step 0 itself.
      is_primary: only this process writes; the others make the same calls and write nothing.
      on_record: called on the primary process with each record after it is written, `step` in it.

    Raises:
      StorageFault: the workdir cannot be written, or metrics.jsonl has a line that is no record.
    """

    def __init__(self, workdir: epath.Path, *, start_step: int, is_primary: bool, on_record: OnRecord | None = None):
        self._on_record = on_record
        self._pending_step: int | None = None
        self._pending: dict[str, float] = {}
        self._writer: metric_writers.MetricWriter | None = None
        self._last_step = -1  # the last recorded step, -1 before the first
        self._logdir = workdir / "tensorboard"
        if not is_primary:
            return
        self._lines = JsonLines(
            workdir / METRICS_FILE, _record, _WHAT, keep=lambda record: 0 < start_step >= record["step"]
        )
        if self._lines.last:
            self._last_step = self._lines.last["step"]
        with storage_errors(self._logdir):
            tensorboard = TensorBoardWriter(self._logdir, purge_step=start_step + 1 if start_step > 0 else 0)
        self._writer = metric_writers.AsyncMultiWriter([tensorboard])

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds numbers to the record of `step`."""
        self._check_pending(step)
        twice = self._pending.keys() & scalars.keys()
        assert not twice, f"written twice at step {step}: {sorted(twice)}"
        assert "step" not in scalars, "`step` is not a metric"
        self._pending_step = step
        self._pending.update(scalars)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes uint8 images (N, H, W, C) of 1, 3 or 4 channels to TensorBoard."""
        if self._writer is not None:
            with storage_errors(self._logdir):
                self._writer.write_images(step, images)

    def commit(self, step: int) -> None:
        """Records everything written for `step` as one line, which is on disk when this returns; no-op without scalars.

        Raises:
          StorageFault: the line, or TensorBoard events written since the last commit, could not be written.
        """
        self._check_pending(step)
        assert step > self._last_step, f"step {step} is already recorded (last: {self._last_step})"
        record = self.withdraw()
        if not record:
            return
        self._last_step = step
        if self._writer is None:
            return
        self._lines.append({"step": step, **without_nan(record)})
        with storage_errors(self._logdir):
            self._writer.write_scalars(step, record)
        if self._on_record is not None:
            self._on_record({"step": step, **record})

    def withdraw(self) -> dict[str, float]:
        """Returns what was written since the last commit, and forgets it."""
        scalars, self._pending, self._pending_step = self._pending, {}, None
        return scalars

    def _check_pending(self, step: int) -> None:
        assert self._pending_step in (None, step), f"step {self._pending_step} was not committed before step {step}"

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Waits until TensorBoard events are written; uncommitted scalars are dropped."""
        try:
            if self._writer is not None:
                with storage_errors(self._logdir):
                    self._writer.close()
        except StorageFault as fault:
            if error is None:
                raise
            logging.error("%s", fault)  # what ended the run is the error to report


def read_metrics(workdir: epath.Path) -> list[dict[str, float]]:
    """Returns the records of a run in the order of their steps, null as NaN; [] if there are none yet.

    Raises:
      StorageFault: a line is no record (a last one cut short is skipped: its run may be writing it now).
    """
    records = read_json_lines(workdir / METRICS_FILE, _record, _WHAT)
    return [{name: math.nan if value is None else value for name, value in record.items()} for record in records]


def _record(value: Any) -> dict[str, Any]:
    if not isinstance(value["step"], int):
        raise TypeError
    return value


def without_nan(value: Any) -> Any:
    """Returns the value with None for floats that JSON cannot hold, also within dicts."""
    if isinstance(value, Mapping):
        return {name: without_nan(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
