"""Rates of a run: images per second, MFU, time to its end."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

# Phases of `watchdog.Watch` that are training itself: updates, and the wait for their batches.
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
