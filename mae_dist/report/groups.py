"""Comparison of runs: groups that differ only in their seeds, and the fields in which configs differ."""

import collections
import dataclasses
import itertools
import json
import os
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ml_collections import ConfigDict

from mae_dist import config as config_lib
from mae_dist.config.stored import MASKING
from mae_dist.report.plot import COLORS, DASHES, Line
from mae_dist.report.runs import Masking, Run
from mae_dist.task_kinds import TaskKind, kind_of

# Fields in which runs of one group may differ: repetitions of an experiment, and where it ran.
_NOT_THE_EXPERIMENT = ("seed", "name", "init_from", "data.data_dir", "data.cache_dir", "cpu")


@dataclasses.dataclass
class Group:
    """Runs of one experiment, equal but for their seeds. Groups of one `family` differ at most in their masking.

    family: the fields that make the experiment, as JSON.
    line: label, colour and dashes in all figures.
    """

    label: str
    family: str
    runs: list[Run]
    line: Line = ("", COLORS[0], DASHES[0])

    @property
    def counted(self) -> list[Run]:
        """Returns the runs whose values are shown: the finished ones, or all if none is finished."""
        return [run for run in self.runs if run.finished] or self.runs

    @property
    def shown(self) -> Run:
        """Returns the run whose pictures and predictions are shown."""
        return self.counted[0]

    @property
    def task(self) -> str:
        return self.shown.config.task

    @property
    def kind(self) -> TaskKind:
        return kind_of(self.shown.config)

    def values(self, name: str) -> list[float]:
        """Returns the last value of a metric for each seed that has it."""
        return self.over_seeds(lambda run: run.last(name))

    def over_seeds(self, value: Callable[[Run], float | None]) -> list[float]:
        """Returns `value` of the counted runs, one for each seed: runs with equal seeds are averaged first."""
        found: dict[tuple[int, ...], list[float]] = {}
        for run in self.counted:
            if (of_run := value(run)) is not None:
                found.setdefault(run.seeds, []).append(of_run)
        return [statistics.fmean(same) for same in found.values()]


def group(runs: Sequence[Run]) -> list[Group]:
    """Returns the runs in groups that differ only in seeds and places, in the order of the first run of each."""
    kinds: dict[tuple[str, Masking | None], list[Run]] = {}
    for run in runs:
        kinds.setdefault((json.dumps(_fields(run)), run.masking), []).append(run)
    groups = [Group("", family, sorted(same, key=lambda run: run.seeds)) for (family, _), same in kinds.items()]
    for one in groups:
        one.label = common_label([run.label for run in one.runs])
    repeated = collections.Counter(one.label for one in groups)
    for one in groups:
        if repeated[one.label] > 1:
            one.label = f"{one.label} ({one.shown.label} …)"
    for one, (dashes, color) in zip(groups, itertools.cycle(itertools.product(DASHES, COLORS)), strict=False):
        one.line = one.label, color, dashes
    return groups


def _fields(run: Run) -> dict[str, Any]:
    """Returns the fields that make a run's experiment, then those of what it was pretrained by, or where that is."""
    fields = _experiment(run.config)
    for depth, origin in enumerate(run.origins, start=1):
        of_origin = _experiment(origin.config) if origin.config else {"weights": str(origin.place or origin.init_from)}
        fields |= {f"{'pretrained ' * depth}{field}": value for field, value in of_origin.items()}
    return fields


def _experiment(config: ConfigDict) -> dict[str, Any]:
    """Returns the fields that make an experiment, without masking: a classifier only inherits it from a recipe."""
    left_out = (*_NOT_THE_EXPERIMENT, *MASKING)
    return {
        field: value
        for field, value in config_lib.flatten(config)
        if not any(field == name or field.startswith(f"{name}.") for name in left_out)
    }


def family_names(groups: Iterable[Group]) -> dict[str, str]:
    """Returns a name for each family: the fields in which they differ, or "" if there is only one."""
    families = {one.family: json.loads(one.family) for one in groups}
    if len(families) <= 1:
        return dict.fromkeys(families, "")
    every = list(families.values())
    differ = []
    for field in every[0]:
        own = field.rpartition(" ")[2]
        inherited = field != own and all(fields.get(field) == fields.get(own) for fields in every)  # is named once
        known = all(field in fields for fields in every)
        if known and not inherited and any(fields[field] != every[0][field] for fields in every):
            differ.append(field)
    names = {
        family: ", ".join(f"{re.sub(r'[^ ]*[.]', '', field)} {fields[field]}" for field in differ)
        for family, fields in families.items()
    }
    repeated = collections.Counter(names.values())
    return {
        family: name if name and repeated[name] == 1 else f"{name} #{number}".strip()
        for number, (family, name) in enumerate(names.items(), start=1)
    }


def common_label(labels: Sequence[str]) -> str:
    """Returns `a_s*_probe` for `a_s0_probe` and `a_s1_probe`."""
    if len(set(labels)) == 1:
        return labels[0]
    start = os.path.commonprefix(labels)  # noqa: RUF071 (of texts, not of paths)
    end = os.path.commonprefix([label[len(start) :][::-1] for label in labels])[::-1]  # noqa: RUF071
    return f"{start}*{end}" if start or end else f"{labels[0]} …"


def scalar_names(groups: Iterable[Group]) -> list[str]:
    """Returns every `train_…`, `val_…` and `test_…` that was recorded, without those of single classes."""
    names = {name for one in groups for run in one.runs for record in run.records for name in record}
    return sorted(name for name in names if re.match(r"(train|val|test)_[^/]+$", name))
