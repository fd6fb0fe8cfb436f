"""Shows a person how a training goes; metrics.jsonl and TensorBoard have all figures."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from absl import logging
from tqdm import tqdm

from mae_dist import console, readable
from mae_dist.parallel import processes

_BAR = "{percentage:3.0f} %|{bar}| step {n:,} of {total:,}{postfix}"
_SPLITS = ("val_", "test_", "train_")
# Only in files: figures behind an accuracy or a warning. Those of single classes have a slash.
_DETAILS = ("_feature_std", "_dead_share", "_top1_min", "_top1_median")


class Progress:
    """Shows the first process's progress: a bar on a terminal, elsewhere one line per log step.

    A line for each evaluation stands above the bar.

    Args:
      total: the last step.
    """

    def __init__(self, total: int):
        self._total = total
        self._shown = sys.stderr is not None and sys.stderr.isatty() and processes.is_primary()
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def compiling(self) -> None:
        """Reports, once, that a person has to wait for the first step."""
        if self._bar is not None:
            return
        self._began = time.monotonic()
        self._bar = tqdm(
            total=self._total,
            disable=not self._shown,
            dynamic_ncols=True,
            leave=False,
            bar_format="compiling the training step …",
        )
        if not self._shown:
            logging.info("Compiling the training step")

    def ready(self, step: int) -> None:
        """Reports that the first step of this start, number `step`, is done."""
        assert self._bar is not None
        self._say(f"Compiled; the first step was done after {readable.duration(time.monotonic() - self._began)}")
        self._bar.n = self._bar.last_print_n = step - 1
        self._bar.leave, self._bar.bar_format = True, _BAR

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the figures of a log step that a person reads."""
        shown = [f"loss {readable.number(values['loss'])}"]
        if "images_per_sec" in values:
            shown.append(f"{readable.number(values['images_per_sec'])} images/s")
            if not self._shown:
                shown.append(f"data wait {readable.percent(values['data_wait'])}")
            if step < self._total:
                shown.append(f"ETA {readable.duration(values['eta_secs'])}")
        shown += [f"{name} {values[name]:.0f}" for name in ("skipped_run", "bad_records") if values.get(name)]
        if self._bar is not None and self._shown:
            self._bar.set_postfix_str(", ".join(shown), refresh=False)
        else:
            logging.info("step %s of %s  %s", readable.count(step), readable.count(self._total), "  ".join(shown))

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """Shows what was evaluated after a step: a line for each split."""
        for prefix in _SPLITS:
            found = {name: value for name, value in values.items() if name.startswith(prefix) and "/" not in name}
            if f"{prefix}knn_top1" in found:  # which says more than the rank of the features
                found.pop(f"{prefix}rank", None)
            shown = [f"{name} {readable.number(found[name])}" for name in found if not name.endswith(_DETAILS)]
            if shown:
                self._say(readable.wrapped((f"step {readable.count(step)}", *shown), "  ", self._width()))

    def advance(self) -> None:
        """Counts a step that is done, with all that came after it."""
        if self._bar is not None:
            self._bar.update()

    def close(self, step: int | None = None) -> None:
        """Leaves the bar as it stands, or at `step`; what is written from now on is below it."""
        if self._bar is not None:
            if step is not None and not self._bar.disable:
                self._bar.n = step
            self._bar.close()

    def _width(self) -> int | None:
        return console.width(sys.stderr) if self._shown else None

    def _say(self, line: str) -> None:
        if self._shown:
            console.write(line)  # in a program that uses the package, too, whose log may show no INFO
        else:
            logging.info("%s", line)
