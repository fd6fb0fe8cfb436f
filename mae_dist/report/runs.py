"""Reading of what runs left in their workdirs, without models or data."""

import collections
import contextlib
import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from mae_dist import config as config_lib
from mae_dist import names
from mae_dist.checkpoint import reader
from mae_dist.errors import StorageFault, UserError
from mae_dist.metrics import goodput
from mae_dist.metrics.recorder import read_metrics
from mae_dist.metrics.summary import read_summary
from mae_dist.storage import absolute, children_of, read_text, storage_errors
from mae_dist.task_kinds import kind_of
from mae_dist.weights import hub


@dataclasses.dataclass(frozen=True)
class Masking:
    """Masking of the pretraining that a run is, or begins from; `file` is set for the strategy `user` only."""

    strategy: str
    ratio: float
    file: str = ""
    block: int = 1


@dataclasses.dataclass(frozen=True)
class Origin:
    """Weights that a run began from.

    place: where they are, None if not found. init_from: where the run's config says they are.
    stored: their config.json as it is, of a run or in another layout.
    config: of the run that trained them, None for weights from elsewhere.
    """

    place: epath.Path | None
    init_from: str
    stored: dict[str, Any]
    config: ConfigDict | None


@dataclasses.dataclass
class Run:
    """Contents of a workdir as it is now.

    label: its name, with the place if other runs have the same name.
    records: of metrics.jsonl, in order.
    summary: summary.json, {} until the run has ended.
    starts: `goodput.read_starts`; ledger: their `goodput.summarize`.
    masking: None for a training that begins from nothing, or from weights that do not say.
    origins: what it began from, nearest first, as far back as can be followed.
    faults: what could not be read, each in a sentence.
    """

    workdir: epath.Path
    config: ConfigDict
    label: str = ""
    records: list[dict[str, float]] = dataclasses.field(default_factory=list)
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)
    starts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    ledger: dict[str, Any] = dataclasses.field(default_factory=dict)
    masking: Masking | None = None
    origins: list[Origin] = dataclasses.field(default_factory=list)
    faults: list[str] = dataclasses.field(default_factory=list)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Returns its own seed and those of its origins: runs with equal ones are no independent trials."""
        return tuple(config.seed for config in (self.config, *(origin.config for origin in self.origins)) if config)

    @property
    def step(self) -> int:
        """Returns the last recorded step, 0 before the first."""
        return int(self.records[-1]["step"]) if self.records else 0

    @property
    def total_steps(self) -> int | None:
        """Returns the steps of the whole run; None if it has recorded too little to know."""
        planned = self.starts[-1]["total_steps"] if self.starts else None
        if known := self.config.total_steps or self.summary.get("total_steps") or planned:
            return int(known)
        for record in reversed(self.records):
            # Of an older version, whose estimate was of the steps alone.
            if record.get("step_secs") and math.isfinite(record.get("eta_secs", math.nan)):
                return int(record["step"]) + round(record["eta_secs"] / record["step_secs"])
        return None

    @property
    def finished(self) -> bool:
        """True if the run has ended with its last step."""
        return self.total_steps is not None and self.step >= self.total_steps and bool(self.summary)

    @property
    def steps_per_epoch(self) -> float | None:
        """Returns the steps per epoch; None where that depends on the data set, as for a run of `total_steps`."""
        total = self.total_steps
        return total / self.config.total_epochs if total and not self.config.total_steps else None

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Returns (steps, values) of all records that have a finite one."""
        found = [(record["step"], record[name]) for record in self.records if math.isfinite(record.get(name, math.nan))]
        return [step for step, _ in found], [value for _, value in found]

    def last(self, name: str) -> float | None:
        """Returns the last finite value recorded under this name."""
        values = self.series(name)[1]
        return values[-1] if values else None

    @property
    def images_per_sec(self) -> float | None:
        """Returns the median over the records."""
        values = self.series("images_per_sec")[1]
        return statistics.median(values) if values else None

    @property
    def work_secs(self) -> float | None:
        """Returns the seconds of work, without the time between a start's end and the next start."""
        secs = self.ledger.get("secs")
        return sum(value for name, value in secs.items() if name != "away") if secs else None


def find_workdirs(paths: Iterable[str]) -> list[epath.Path]:
    """Returns the runs at these paths, each once; for a directory that is no run, those among its children.

    Raises:
      StorageFault: there is no run at a path.
    """
    found: dict[epath.Path, None] = {}
    for given in paths:
        path = absolute(given)
        with storage_errors(path):
            children = [path] if (path / "config.json").exists() else children_of(path)
            runs = [child for child in children if (child / "config.json").exists()]
        if not runs:
            raise StorageFault(
                f"{path} is neither the workdir of a run nor a directory of such: there is no config.json in it nor "
                "one level below; correct the path"
            )
        found |= dict.fromkeys(runs)
    return list(found)


def collect(workdirs: Sequence[epath.Path]) -> tuple[list[Run], list[str]]:
    """Returns the runs in these workdirs, and sentences about those whose config cannot be read."""
    runs, unreadable = [], []
    for workdir in workdirs:
        try:
            runs.append(_read(workdir))
        except (UserError, ValueError, KeyError, TypeError) as error:  # a config.json of whatever kind
            unreadable.append(f"{workdir}: {reader.first_line(error)}")
    for place in ("name", "path"):
        labels = collections.Counter(run.label for run in runs)
        for run in runs:
            if labels[run.label] > 1:
                run.label = f"{run.config.name} ({run.workdir.name if place == 'name' else run.workdir})"
    return runs, unreadable


def _read(workdir: epath.Path) -> Run:
    config = reader.read_config(workdir)
    run = Run(workdir, config, config.name, origins=_find_origins(config, workdir))
    for name, read in (("records", read_metrics), ("starts", goodput.read_starts), ("summary", read_summary)):
        try:
            setattr(run, name, read(workdir))
        except UserError as error:
            run.faults.append(reader.first_line(error))
    run.ledger = goodput.summarize(run.starts)
    run.masking = _masking(run)
    return run


def _find_origins(config: ConfigDict, workdir: epath.Path) -> list[Origin]:
    """Returns the weights at `init_from`, those that they were trained from, and so on."""
    origins: list[Origin] = []
    while config.init_from and len(origins) < 10:  # a cycle would never end
        origins.append(origin := _find_origin(config, workdir))
        if origin.place is None or origin.config is None:
            break
        config, workdir = origin.config, origin.place
    return origins


def _find_origin(config: ConfigDict, workdir: epath.Path) -> Origin:
    """Returns the weights at `init_from`, or beside the run if both were moved; those of the hub if it was cached."""
    init_from = config.init_from
    if init_from.startswith(names.HUB):
        found = hub.cached(init_from, config.init_commit)
        places = [] if found is None else [found]
    else:
        places = [workdir.parent / config_lib.last_name(init_from)]
        with contextlib.suppress(UserError):  # a bucket out of reach
            places.insert(0, absolute(init_from))
    for place in places:
        try:
            text = read_text(place / "config.json")
            stored = dict(json.loads(text))
        except (OSError, ValueError, TypeError):  # "" is of a file that does not exist
            continue
        found_config = None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # of whatever kind
            # No run's first checkpoint is of step 0: that is where converted weights are.
            if "model_type" not in stored and not (place / "checkpoints" / "0").exists():
                found_config = config_lib.from_json(text)
        return Origin(place, init_from, stored, found_config)
    return Origin(None, init_from, {}, None)


def _masking(run: Run) -> Masking | None:
    if kind_of(run.config).has_decoder:
        return _masking_of(run.config.model)
    origin = next((one for one in run.origins if one.config is None or kind_of(one.config).has_decoder), None)
    if origin is None:
        return None
    if origin.place is None:  # a probe's own config has the ratio of the recipe that it comes from
        run.faults.append(
            f"no config.json found at init_from={origin.init_from!r}: masking strategy and ratio are those of the "
            "run's own config"
        )
        return _masking_of(run.config.model)
    try:  # in Hugging Face's layout the fields are not in sections
        return _masking_of(origin.config.model if origin.config else origin.stored.get("model", origin.stored))
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _masking_of(model: Any) -> Masking:
    strategy = str(model.get("masking", "random"))
    file = str(model["mask_file"]) if strategy == "user" else ""
    return Masking(strategy, float(model["mask_ratio"]), file, int(model.get("mask_block", 1)))
