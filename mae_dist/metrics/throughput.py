"""Rates of a run: images per second, MFU, time to its end."""

from collections.abc import Callable, Mapping

Account = Mapping[str, float]  # seconds spent in each phase of `watchdog.Watchdog`


class Throughput:
    """Computes rates of the training steps alone, which are the phases `step` and `data` of the ledger.

    They are the device's rates if a phase other than `data` begins only after the device has finished the steps before.

    Args:
      images_per_step: the global batch size.
      total_steps: the last step of the run.
      flops_per_image: of one training step (`mae_dist.model.flops`).
      peak_flops: FLOP/s of all devices of the run together, None where unknown: then there is no `mfu`.
      account: seconds spent in each phase until now, `Watchdog.account`.
    """

    def __init__(
        self,
        *,
        images_per_step: int,
        total_steps: int,
        flops_per_image: float,
        peak_flops: float | None,
        account: Callable[[], Account],
    ):
        self._images_per_step, self._total_steps = images_per_step, total_steps
        self._mfu_per_image = None if peak_flops is None else flops_per_image / peak_flops
        self._account = account

    def start(self, step: int) -> None:
        """Starts counting, after the device has finished `step`."""
        self._first = self._last = step, dict(self._account())

    def log(self, step: int) -> dict[str, float]:
        """Returns rates since the last call or `start`, after the device has finished `step`; {} without a new step.

        Returns:
          step_secs: seconds per training step. images_per_sec: the global batch size divided by it. data_wait: the
          fraction of that time (0..1) in which the loop waited for a batch. eta_secs: seconds until the last step at
          this rate, with as much saving and evaluating per step as since `start`. mfu (0..1): on devices with a known
          peak.
        """
        (first_step, first), (last_step, last) = self._first, self._last
        if step == last_step:
            return {}
        now = dict(self._account())
        self._last = step, now
        secs = max(_training_secs(now) - _training_secs(last), 1e-9)
        step_secs = secs / (step - last_step)
        pause_secs = (_other_secs(now) - _other_secs(first)) / (step - first_step)
        rates = {
            "images_per_sec": self._images_per_step / step_secs,
            "step_secs": step_secs,
            "data_wait": (now["data"] - last["data"]) / secs,
            "eta_secs": max(self._total_steps - step, 0) * (step_secs + pause_secs),
        }
        if self._mfu_per_image is not None:
            rates["mfu"] = rates["images_per_sec"] * self._mfu_per_image
        return rates


def _training_secs(account: Account) -> float:
    return account["step"] + account["data"]


def _other_secs(account: Account) -> float:
    return sum(account.values()) - _training_secs(account)
