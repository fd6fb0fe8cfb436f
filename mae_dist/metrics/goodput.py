"""Ledger of a run's time across restarts, goodput.jsonl, and the fraction of it that was progress.

One JSON object per line, written from time to time while a process works and when it ends; for each start (`run`) the
last line counts. What a killed process did after its last line is lost.
"""

import collections
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from mae_dist.storage import JsonLines, read_json_lines

GOODPUT_FILE = "goodput.jsonl"
_WHAT = "entry of the ledger"
_EVERY_SECS = 10.0


class Ledger:
    """Writes the lines of one start, which `began` (seconds since 1970, as `clock`) and continues from `from_step`."""

    def __init__(
        self,
        workdir: epath.Path,
        *,
        from_step: int,
        total_steps: int,
        began: float,
        is_primary: bool,
        clock: Callable[[], float] = time.time,
    ):
        self._from_step, self._total_steps, self._began = from_step, total_steps, began
        self._clock = clock
        self._written = -_EVERY_SECS
        self._lines = JsonLines(workdir / GOODPUT_FILE, _entry, _WHAT) if is_primary else None
        self._run = 1 + (self._lines.last["run"] if self._lines and self._lines.last else 0)

    def note(self, step: int, secs: Mapping[str, float], end: str = "") -> None:
        """Writes the time until now, `secs` by phase: at most every ten seconds, but always at an `end`."""
        now = self._clock()
        if self._lines is None or (not end and 0 <= now - self._written < _EVERY_SECS):
            return
        self._written = now
        line = {
            "run": self._run,
            "began": round(self._began, 3),
            "time": round(now, 3),
            "from_step": self._from_step,
            "step": step,
            "total_steps": self._total_steps,
            "end": end,
            "secs": {name: round(value, 3) for name, value in secs.items()},
        }
        self._lines.append(line)


def read_starts(workdir: epath.Path) -> list[dict[str, Any]]:
    """Returns the last line of each start, in order; [] without a ledger.

    `began` and `time` are seconds since 1970; `total_steps` is None in an older version's.
    """
    last = {entry["run"]: entry for entry in read_json_lines(workdir / GOODPUT_FILE, _entry, _WHAT)}
    return [last[run] for run in sorted(last)]


def summarize(starts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns where the time since the run's first start went; {} without a ledger.

    Returns:
      productive_share: the fraction of all time that went into steps that counted.
      runs: number of starts. steps_replayed: steps done again, because they had not been saved.
      secs: by phase; `step` without what was `replayed`; `away`: between the end of one start and the next.
    """
    if not starts:
        return {}
    secs = collections.defaultdict[str, float](float)
    for start in starts:
        for name, value in start["secs"].items():
            secs[name] += value
    replayed_steps, replayed_secs, away = 0, 0.0, 0.0
    for start, following in itertools.pairwise(starts):
        again = max(0, start["step"] - following["from_step"])
        done = max(1, start["step"] - start["from_step"])
        replayed_steps += again
        replayed_secs += min(again / done, 1.0) * start["secs"].get("step", 0.0)
        away += max(0.0, following["began"] - start["time"])  # a clock that was set back took no time
    secs["step"] -= replayed_secs
    secs |= {"replayed": replayed_secs, "away": away}
    total = sum(secs.values())
    return {
        "productive_share": round(secs["step"] / total, 4) if total else 0.0,
        "runs": len(starts),
        "steps_replayed": replayed_steps,
        "secs": {name: round(value, 1) for name, value in secs.items()},
    }


def _entry(value: Any) -> dict[str, Any]:
    return {
        **{name: float(value[name]) for name in ("began", "time")},
        **{name: int(value[name]) for name in ("run", "from_step", "step")},
        "total_steps": int(value["total_steps"]) if "total_steps" in value else None,
        "secs": {str(name): float(secs) for name, secs in value["secs"].items()},
    }
