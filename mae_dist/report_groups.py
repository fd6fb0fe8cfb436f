"""Runs of a report against each other: groups that differ in their seeds alone, fields in which configs differ."""

import collections
import dataclasses
import itertools
import json
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from mae_dist import checkpoint
from mae_dist import config as config_lib
from mae_dist.report_runs import Masking, Run

# Fields in which runs of one group may differ: what repeats an experiment, and where it was carried out.
_NOT_THE_EXPERIMENT = ("seed", "name", "init_from", "data.data_dir", "data.cache_dir", "cpu")
_MASKING = ("model.masking", "model.mask_ratio", "model.mask_file")


@dataclasses.dataclass
class Group:
    """Runs of one experiment: equal but for their seeds. Groups of one `family` differ in their masking at most."""

    label: str
    family: str
    runs: list[Run]

    @property
    def shown(self) -> Run:
        """The one whose pictures and predictions stand for all."""
        return self.runs[0]

    @property
    def task(self) -> str:
        return self.shown.config.task

    def values(self, name: str) -> list[float]:
        return [value for value in (run.last(name) for run in self.runs) if value is not None]


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and, of several, the sample standard deviation (n - 1)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def group(runs: Sequence[Run], default: ConfigDict) -> list[Group]:
    """The runs in groups that differ in nothing but seeds and places, in the order of the first of each."""
    kinds: dict[tuple[str, Masking | None], list[Run]] = {}
    for run in runs:
        configs = [run.config, *([checkpoint.read_config(run.source, default)] if run.source else [])]
        family = json.dumps([list(_experiment(config)) for config in configs])
        kinds.setdefault((family, run.masking), []).append(run)
    groups = [Group("", family, sorted(same, key=lambda run: run.config.seed)) for (family, _), same in kinds.items()]
    for one in groups:
        one.label = common_label([run.label for run in one.runs])
    repeated = collections.Counter(one.label for one in groups)
    for one in groups:
        if repeated[one.label] > 1:
            one.label = f"{one.label} ({one.shown.label} …)"
    return groups


def _experiment(config: ConfigDict) -> Iterator[tuple[str, Any]]:
    """The fields that make an experiment, without masking: a classifier's are only inherited from a recipe."""
    for field, value in config_lib.flatten(config):
        if not any(field == name or field.startswith(f"{name}.") for name in (*_NOT_THE_EXPERIMENT, *_MASKING)):
            yield field, value


def common_label(labels: Sequence[str]) -> str:
    """`a_s0_probe`, `a_s1_probe` -> `a_s*_probe`."""
    if len(set(labels)) == 1:
        return labels[0]
    start = _common_start(labels)
    end = _common_start([label[len(start) :][::-1] for label in labels])[::-1]
    return f"{start}*{end}" if start or end else f"{labels[0]} …"


def _common_start(texts: Sequence[str]) -> str:
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    return "".join(letters[0] for letters in same)


def differing_fields(runs: Sequence[Run]) -> tuple[list[tuple[str, list[Any]]], list[tuple[str, Any]]]:
    """(fields that differ with the value of each run, fields that are the same with theirs)."""
    flat = [dict(config_lib.flatten(run.config)) for run in runs]
    differ, same = [], []
    for field in flat[0]:
        values = [fields.get(field) for fields in flat]
        if all(value == values[0] for value in values):
            same.append((field, values[0]))
        else:
            differ.append((field, values))
    return differ, same


def scalar_names(runs: Iterable[Run]) -> list[str]:
    """Every `val_…` and `test_…` that was recorded, without those of single classes."""
    names = {name for run in runs for record in run.records for name in record}
    return sorted(name for name in names if re.match(r"(val|test)_[^/]+$", name))
