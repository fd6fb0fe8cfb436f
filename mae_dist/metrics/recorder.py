"""Writing and reading of a run's metrics: metrics.jsonl and TensorBoard events.

metrics.jsonl holds one JSON object per recorded step, in ascending order of `step`. Numbers round-trip exactly; JSON
has no NaN, so a value that is not finite is written as null and read back as NaN.
"""

import json
import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from mae_dist.errors import StorageFault
from mae_dist.metrics.tensorboard import TensorBoardWriter, metric_writers
from mae_dist.storage import Lines, parse_lines, read_text, storage_errors, write_text_atomically

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"

Scalar = float | np.generic | np.ndarray | jax.Array


class Recorder:
    """Records a run's metrics, each step at most once, also across restarts.

    Drops what an earlier process recorded beyond the checkpoint that this one continues from (and a last line that was
    cut short), so that after any number of restarts the file equals that of one uninterrupted run.

    Args:
      workdir: the run's directory, made if it does not exist.
      start_step: the step of the restored checkpoint; lines beyond it are dropped. 0 is a run from its beginning, with
        nothing restored: all lines are dropped, so that it may record step 0 itself.
      is_primary: only this process writes; the others make the same calls and write nothing.
      log_lines: also logs each record.

    Raises:
      StorageFault: the workdir cannot be written, or metrics.jsonl has a line that is no record.
    """

    def __init__(self, workdir: epath.Path, *, start_step: int, is_primary: bool, log_lines: bool = True):
        self._path = workdir / METRICS_FILE
        self._pending_step: int | None = None
        self._pending: dict[str, Scalar] = {}
        self._writer: metric_writers.MetricWriter | None = None
        self._last_step = -1  # the last recorded step, -1 before the first
        if not is_primary:
            return
        self._logdir = workdir / TENSORBOARD_DIR
        with storage_errors(self._path):
            workdir.mkdir(parents=True, exist_ok=True)
            text = read_text(self._path)
            records = [pair for pair in _parse(text, self._path) if 0 < start_step >= pair[1]["step"]]
            kept = "".join(line + "\n" for line, _ in records)
            if kept != text:
                write_text_atomically(self._path, kept)
            self._last_step = records[-1][1]["step"] if records else -1
            self._lines = Lines(self._path, kept)
        with storage_errors(self._logdir):
            tensorboard = TensorBoardWriter(self._logdir, purge_step=start_step + 1 if start_step > 0 else 0)
        lines = [metric_writers.LoggingWriter()] if log_lines else []
        self._writer = metric_writers.AsyncMultiWriter([*lines, tensorboard])

    def write_scalars(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        """Adds scalars to the record of `step`; device arrays of shape () stay on the device until `commit`."""
        self._check_pending(step)
        twice = self._pending.keys() & scalars.keys()
        assert not twice, f"written twice at step {step}: {sorted(twice)}"
        assert "step" not in scalars, "`step` is not a metric"
        self._pending_step = step
        self._pending.update(scalars)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes images (N, H, W, C), uint8 or floats in 0..1, to TensorBoard."""
        if self._writer is not None:
            with storage_errors(self._logdir):
                self._writer.write_images(step, {name: jax.device_get(image) for name, image in images.items()})

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
        line = json.dumps({"step": step, **without_nan(record)}, allow_nan=False)
        with storage_errors(self._path):
            self._lines.append(line + "\n")
        with storage_errors(self._logdir):
            self._writer.write_scalars(step, record)

    def withdraw(self) -> dict[str, float]:
        """Returns what was written since the last commit, as numbers, and forgets it."""
        scalars, self._pending, self._pending_step = self._pending, {}, None
        return {name: _number(name, value) for name, value in jax.device_get(scalars).items()}

    def _check_pending(self, step: int) -> None:
        assert self._pending_step in (None, step), f"step {self._pending_step} was not committed before step {step}"

    def close(self) -> None:
        """Waits until TensorBoard events are written; uncommitted scalars are dropped."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with storage_errors(self._logdir):
                writer.close()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except StorageFault as fault:
            if error is None:
                raise
            logging.error("%s", fault)  # what ended the run is the error to report


def read_metrics(workdir: epath.Path) -> list[dict[str, float]]:
    """Returns the records of a run in the order of their steps, null as NaN; [] if there are none yet.

    Raises:
      StorageFault: a line is no record (a last one cut short is skipped: its run may be writing it now).
    """
    path = workdir / METRICS_FILE
    with storage_errors(path):
        records = [record for _, record in _parse(read_text(path), path)]
    return [{name: math.nan if value is None else value for name, value in record.items()} for record in records]


def _parse(text: str, path: epath.Path) -> list[tuple[str, dict[str, Any]]]:
    """Returns the lines of metrics.jsonl with the record in each."""
    return parse_lines(text, path, _record, "record of a step")


def _record(value: Any) -> dict[str, Any]:
    if not isinstance(value["step"], int):
        raise TypeError
    return value


def _number(name: str, value: Any) -> float:
    assert np.ndim(value) == 0, f"metric {name} has shape {np.shape(value)}, not ()"
    return value.item() if isinstance(value, np.generic | np.ndarray) else value


def without_nan(value: Any) -> Any:
    """Returns the value with None for floats that JSON cannot hold, and Python numbers for NumPy's."""
    if isinstance(value, Mapping):
        return {name: without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return without_nan(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
