"""What a run leaves behind to be read: metrics.jsonl, TensorBoard events, summary.json; and its throughput.

metrics.jsonl holds one JSON object per recorded step, in ascending order of `step`. Numbers round-trip exactly; JSON
has no NaN, so a value that is not finite is written as null and read back as NaN.
"""

import json
import math
import platform
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath

from mae_dist.clu_without_tf import TensorBoardWriter, metric_writers
from mae_dist.errors import StorageFault
from mae_dist.storage import naming_faults, open_lines, parse_lines, read_text, write_text_atomically

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
TENSORBOARD_DIR = "tensorboard"

Scalar = float | np.generic | np.ndarray | jax.Array


class Recorder:
    """Keeps a run's metrics: each step is recorded at most once, also across restarts.

    Opening it drops what an earlier process recorded beyond the checkpoint that this one continues from (and a last
    line that was cut short), so that after any number of restarts the file reads as that of one uninterrupted run.

    Args:
      workdir: the run's directory, made if it does not exist.
      start_step: the step of the restored checkpoint; lines beyond it are dropped. 0 is a run from its beginning, with
        nothing restored: all lines are dropped, so that it may record step 0 itself.
      is_primary: whether this process writes. The others may make the same calls and write nothing.
      log_lines: whether each record is also a log line.

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
        with naming_faults(self._path):
            workdir.mkdir(parents=True, exist_ok=True)
            text = read_text(self._path)
            records = [pair for pair in _parse(text, self._path) if 0 < start_step >= pair[1]["step"]]
            kept = "".join(line + "\n" for line, _ in records)
            if kept != text:
                write_text_atomically(self._path, kept)
            self._last_step = records[-1][1]["step"] if records else -1
            self._lines = open_lines(self._path, kept)
        with naming_faults(self._logdir):
            tensorboard = TensorBoardWriter(self._logdir, purge_step=start_step + 1 if start_step > 0 else 0)
        lines = [metric_writers.LoggingWriter()] if log_lines else []
        self._writer = metric_writers.AsyncMultiWriter([*lines, tensorboard])

    def write_scalars(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        """Adds scalars to the record of `step`; device arrays of shape () stay on the device until `commit`."""
        assert self._pending_step in (None, step), f"step {self._pending_step} was not committed before step {step}"
        twice = self._pending.keys() & scalars.keys()
        assert not twice, f"written twice at step {step}: {sorted(twice)}"
        assert "step" not in scalars, "`step` is not a metric"
        self._pending_step = step
        self._pending.update(scalars)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes images (N, H, W, C), uint8 or floats in 0..1, to TensorBoard."""
        if self._writer is not None:
            with naming_faults(self._logdir):
                self._writer.write_images(step, {name: jax.device_get(image) for name, image in images.items()})

    def commit(self, step: int) -> None:
        """Records everything written for `step`, as one line that is on disk when this returns; no-op without scalars.

        Raises:
          StorageFault: the line, or TensorBoard events written since the last commit, could not be written.
        """
        assert self._pending_step in (None, step), f"step {self._pending_step} was not committed before step {step}"
        assert step > self._last_step, f"step {step} is already recorded (last: {self._last_step})"
        scalars, self._pending, self._pending_step = self._pending, {}, None
        if not scalars:
            return
        self._last_step = step
        if self._writer is None:
            return
        record = {name: _number(name, value) for name, value in jax.device_get(scalars).items()}
        line = json.dumps({"step": step, **_without_nan(record)}, allow_nan=False)
        with naming_faults(self._path):
            self._lines.append(line + "\n")
        with naming_faults(self._logdir):
            self._writer.write_scalars(step, record)

    def withdraw(self) -> dict[str, float]:
        """Takes back what was written since the last commit, as numbers."""
        scalars, self._pending, self._pending_step = self._pending, {}, None
        return {name: _number(name, value) for name, value in jax.device_get(scalars).items()}

    def close(self) -> None:
        """Waits until TensorBoard events are written; uncommitted scalars are dropped."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with naming_faults(self._logdir):
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


# Phases of `watch.Watch` that are training itself: updates, and the wait for their batches.
_TRAINING = ("step", "data")


class Throughput:
    """Rates of the training steps alone, taken from the account of phases that the ledger is written from.

    A step's time is that of the phases `step` and `data`. Saving, evaluation, pictures, a profile's writing and the
    first update of a start, which compiles, are phases of their own and in no rate. That is true of the device as of
    the host if a phase other than `data` begins when the device has finished the updates before it.

    Args:
      images_per_step: the global batch size.
      total_steps: the last step of the run.
      flops_per_image: of one training step (`mae_dist.model.flops`).
      peak_flops: FLOP/s of all devices of the run together, None where unknown: then there is no `mfu`.
      account: seconds spent in each phase until now, `Watch.account`.
    """

    def __init__(
        self,
        *,
        images_per_step: int,
        total_steps: int,
        flops_per_image: float,
        peak_flops: float | None,
        account: Callable[[], Mapping[str, float]],
    ):
        self._images_per_step, self._total_steps = images_per_step, total_steps
        self._mfu_per_image = None if peak_flops is None else flops_per_image / peak_flops
        self._account = account
        self._first = self._last = _Mark(0, 0.0, 0.0, 0.0)

    def start(self, step: int) -> None:
        """Begins to count, after the device has finished `step`."""
        self._first = self._last = self._mark(step)

    def _mark(self, step: int) -> "_Mark":
        secs = self._account()
        training = sum(secs[phase] for phase in _TRAINING)
        return _Mark(step, training, secs["data"], sum(secs.values()) - training)

    def log(self, step: int) -> dict[str, float]:
        """Rates since the last call or `start`, after the device has finished `step`.

        Returns:
          step_secs: seconds per training step, images_per_sec: the global batch size by it. data_wait: the fraction of
          that time (0..1) in which the loop waited for a batch. eta_secs: seconds until the last step at this rate,
          with as much saving and evaluating per step as there was since `start`. mfu (0..1): on devices with a known
          peak. Nothing if no step was completed since.
        """
        if step == self._last.step:
            return {}
        last, self._last = self._last, self._mark(step)
        now = self._last
        secs = max(now.training - last.training, 1e-9)
        step_secs = secs / (now.step - last.step)
        pause_secs = (now.pauses - self._first.pauses) / (now.step - self._first.step)
        rates = {
            "images_per_sec": self._images_per_step / step_secs,
            "step_secs": step_secs,
            "data_wait": (now.waiting - last.waiting) / secs,
            "eta_secs": max(self._total_steps - step, 0) * (step_secs + pause_secs),
        }
        if self._mfu_per_image is not None:
            rates["mfu"] = rates["images_per_sec"] * self._mfu_per_image
        return rates


class _Mark(NamedTuple):
    """Seconds spent until a step was finished: in training, of that waiting for batches, and in all else."""

    step: int
    training: float
    waiting: float
    pauses: float


def read_metrics(workdir: epath.Path) -> list[dict[str, float]]:
    """The records of a run in the order of their steps, null as NaN; [] if there are none yet.

    Raises:
      StorageFault: a line that is no record (a last one cut short is passed over: its run may be writing it now).
    """
    path = workdir / METRICS_FILE
    with naming_faults(path):
        records = [record for _, record in _parse(read_text(path), path)]
    return [{name: math.nan if value is None else value for name, value in record.items()} for record in records]


def last_values(records: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The last value of each name.

    Of single classes (`val_top1/<class>`) those of the split's last evaluation alone: of many classes each evaluation
    records its own lowest, and the others' would be of earlier ones.
    """
    last: dict[str, float] = {}
    for record in records:
        renewed = tuple({name.partition("/")[0] + "/" for name in record if "/" in name})
        last = {name: value for name, value in last.items() if not name.startswith(renewed)} | dict(record)
    return last


def write_summary(workdir: epath.Path, summary: Mapping[str, Any]) -> None:
    """Writes summary.json atomically; values that are not finite become null."""
    path = workdir / SUMMARY_FILE
    with naming_faults(path):
        workdir.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_without_nan(jax.device_get(dict(summary))), indent=2, allow_nan=False)
        write_text_atomically(path, text + "\n")


def environment() -> dict[str, str | int]:
    """Versions and devices that a result depends on."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
    return {
        "python": platform.python_version(),
        **{name.replace("-", "_"): version(name) for name in packages},
        "platform": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
    }


def _parse(text: str, path: epath.Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines of metrics.jsonl with the record in each."""
    return parse_lines(text, path, _record, "record of a step")


def _record(value: Any) -> dict[str, Any]:
    if not isinstance(value["step"], int):
        raise TypeError
    return value


def _number(name: str, value: Any) -> float:
    assert np.ndim(value) == 0, f"metric {name} has shape {np.shape(value)}, not ()"
    return value.item() if isinstance(value, np.generic | np.ndarray) else value


def _without_nan(value: Any) -> Any:
    """The value with None for floats that JSON cannot hold, and Python numbers for NumPy's."""
    if isinstance(value, Mapping):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return _without_nan(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
