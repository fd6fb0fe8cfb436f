"""Ledger of a run's time across restarts, goodput.jsonl, and the fraction of it that was progress.

One JSON object per line, written from time to time while a process works and when it ends; for each start (`run`) the
last line counts. What a killed process did after its last line is lost.
"""

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from mae_dist.storage import Lines, parse_lines, read_text, storage_errors, write_text_atomically

GOODPUT_FILE = "goodput.jsonl"
_EVERY_SECS = 10.0


class Ledger:
    """Writes the lines of one start.

    Args:
      workdir: the run's directory.
      from_step: the step that this start continues from.
      total_steps: the last step of the run.
      began: when this process started, seconds since 1970.
      is_primary: only this process writes.
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
                whole = "".join(line + "\n" for line, _ in parsed)  # a line cut short by a kill would spoil the next
                self._run = len({entry["run"] for _, entry in parsed}) + 1
                if whole != text:
                    write_text_atomically(self._path, whole)
                self._lines = Lines(self._path, whole)

    def note(self, step: int, secs: Mapping[str, float], end: str = "") -> None:
        """Writes the time until now, `secs` by phase: at most every ten seconds, but always at an `end`."""
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


def read_starts(workdir: epath.Path) -> list[dict[str, Any]]:
    """Returns the last line of each start, in order; [] without a ledger.

    Each has `began` and `time`, seconds since 1970; `from_step`, `step` and `total_steps` (None in an older version's);
    `secs` by phase.
    """
    path = workdir / GOODPUT_FILE
    with storage_errors(path):
        last = {entry["run"]: entry for _, entry in _parse(read_text(path), path)}
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
    secs: dict[str, float] = {}
    for start in starts:
        for name, value in start["secs"].items():
            secs[name] = secs.get(name, 0.0) + value
    replayed_steps, replayed_secs, away = 0, 0.0, 0.0
    for start, following in itertools.pairwise(starts):
        again = max(0, start["step"] - following["from_step"])
        done = max(1, start["step"] - start["from_step"])
        replayed_steps += again
        replayed_secs += min(again / done, 1.0) * start["secs"].get("step", 0.0)
        away += max(0.0, following["began"] - start["time"])  # a clock that was set back took no time
    secs["step"] = secs.get("step", 0.0) - replayed_secs
    secs |= {"replayed": replayed_secs, "away": away}
    total = sum(secs.values())
    return {
        "productive_share": round(secs["step"] / total, 4) if total else 0.0,
        "runs": len(starts),
        "steps_replayed": replayed_steps,
        "secs": {name: round(value, 1) for name, value in secs.items()},
    }


def _parse(text: str, path: epath.Path) -> list[tuple[str, dict[str, Any]]]:
    """Returns the lines of goodput.jsonl with the entry in each."""
    return parse_lines(text, path, _entry, "entry of the ledger")


def _entry(value: Any) -> dict[str, Any]:
    return {
        **{name: float(value[name]) for name in ("began", "time")},
        **{name: int(value[name]) for name in ("run", "from_step", "step")},
        "total_steps": int(value["total_steps"]) if "total_steps" in value else None,
        "secs": {str(name): float(secs) for name, secs in value["secs"].items()},
    }
