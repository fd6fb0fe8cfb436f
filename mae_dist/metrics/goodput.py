"""The ledger of a run's time: goodput.jsonl, across restarts, and what share of it was progress.

One JSON object per line, written from time to time while a process works and when it ends; of each start (`run`) the
last line counts. What a killed process did after its last line is not in it.
"""

import itertools
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from mae_dist.storage import Lines, parse_lines, read_text, storage_errors, write_text_atomically

GOODPUT_FILE = "goodput.jsonl"
_EVERY_SECS = 10.0


class Ledger:
    """The lines of one start.

    Args:
      workdir: the run's directory.
      from_step: the update that this start continues from.
      total_steps: the update that the run is to end with.
      began: when this process started, seconds since 1970.
      is_primary: whether this process writes.
      clock: seconds since 1970.
    """

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
        self._path = workdir / GOODPUT_FILE
        self._from_step, self._total_steps, self._began = from_step, total_steps, began
        self._clock = clock
        self._written = -_EVERY_SECS
        self._is_primary = is_primary
        if is_primary:
            with storage_errors(self._path):
                workdir.mkdir(parents=True, exist_ok=True)
                text = read_text(self._path)
                parsed = _parse(text, self._path)
                whole = "".join(line + "\n" for line, _ in parsed)  # one cut short by a kill would spoil the next
                self._run = len(_runs(parsed)) + 1
                if whole != text:
                    write_text_atomically(self._path, whole)
                self._lines = Lines(self._path, whole)

    def note(self, step: int, secs: Mapping[str, float], end: str = "") -> None:
        """Where the time went until now, `secs` by phase; at most every ten seconds, but always at an `end`."""
        now = self._clock()
        if not self._is_primary or (not end and 0 <= now - self._written < _EVERY_SECS):
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
        with storage_errors(self._path):
            self._lines.append(json.dumps(line) + "\n")


def summarize(workdir: epath.Path) -> dict[str, Any]:
    """What became of the time since the run's first start; {} without a ledger.

    Returns:
      productive_share: of all time, what went into updates that counted.
      runs: starts. steps_replayed: updates done again, for they had not been saved.
      secs: by phase; of them `step` without what was `replayed`; `away`: between the end of one start and the next.
    """
    path = workdir / GOODPUT_FILE
    with storage_errors(path):
        runs = _runs(_parse(read_text(path), path))
    if not runs:
        return {}
    secs: dict[str, float] = {}
    for run in runs:
        for name, value in run["secs"].items():
            secs[name] = secs.get(name, 0.0) + value
    replayed_steps, replayed_secs, away = 0, 0.0, 0.0
    for run, following in itertools.pairwise(runs):
        again = max(0, run["step"] - following["from_step"])
        done = max(1, run["step"] - run["from_step"])
        replayed_steps += again
        replayed_secs += min(again / done, 1.0) * run["secs"].get("step", 0.0)
        away += max(0.0, following["began"] - run["time"])  # a clock that was set back took no time
    secs["step"] = secs.get("step", 0.0) - replayed_secs
    secs |= {"replayed": replayed_secs, "away": away}
    total = sum(secs.values())
    return {
        "productive_share": round(secs["step"] / total, 4) if total else 0.0,
        "runs": len(runs),
        "steps_replayed": replayed_steps,
        "secs": {name: round(value, 1) for name, value in secs.items()},
    }


def span(workdir: epath.Path) -> tuple[float, float] | None:
    """When the run began and when it was last known to work, seconds since 1970; None without a ledger."""
    path = workdir / GOODPUT_FILE
    with storage_errors(path):
        runs = _runs(_parse(read_text(path), path))
    return (runs[0]["began"], runs[-1]["time"]) if runs else None


def total_steps(workdir: epath.Path) -> int | None:
    """The update that the run is to end with; None without a ledger, or with one of an older version."""
    path = workdir / GOODPUT_FILE
    with storage_errors(path):
        runs = _runs(_parse(read_text(path), path))
    return runs[-1]["total_steps"] if runs else None


def _parse(text: str, path: epath.Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines of goodput.jsonl with the entry in each."""
    return parse_lines(text, path, _entry, "entry of the ledger")


def _entry(value: Any) -> dict[str, Any]:
    return {
        **{name: float(value[name]) for name in ("began", "time")},
        **{name: int(value[name]) for name in ("run", "from_step", "step")},
        "total_steps": int(value["total_steps"]) if "total_steps" in value else None,
        "secs": {str(name): float(secs) for name, secs in value["secs"].items()},
    }


def _runs(parsed: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The last entry of each start, in order."""
    last = {entry["run"]: entry for _, entry in parsed}
    return [last[run] for run in sorted(last)]
