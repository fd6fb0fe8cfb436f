"""Runs of a report against each other: groups that differ in their seeds alone, fields in which configs differ."""

import collections
import dataclasses
import itertools
import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ml_collections import ConfigDict

from mae_dist import config as config_lib
from mae_dist.config.stored import MASKING
from mae_dist.metrics import results
from mae_dist.report.runs import Masking, Origin, Run
from mae_dist.task_kinds import TaskKind, kind_of

# Fields in which runs of one group may differ: what repeats an experiment, and where it was carried out.
_NOT_THE_EXPERIMENT = ("seed", "name", "init_from", "data.data_dir", "data.cache_dir", "cpu")


@dataclasses.dataclass
class Group:
    """Runs of one experiment: equal but for their seeds. Groups of one `family` differ in their masking at most.

    family: the fields that make the experiment, as JSON: [field, value] pairs of the runs' configs, then those of each
      origin's, or where its weights came from.
    """

    label: str
    family: str
    runs: list[Run]

    @property
    def counted(self) -> list[Run]:
        """The runs that figures are of: those that are finished; as long as none is, all."""
        return [run for run in self.runs if run.finished] or self.runs

    @property
    def shown(self) -> Run:
        """The one whose pictures and predictions stand for all."""
        return self.counted[0]

    @property
    def task(self) -> str:
        return self.shown.config.task

    @property
    def kind(self) -> TaskKind:
        return kind_of(self.shown.config)

    def values(self, name: str) -> list[float]:
        """The last values of a metric, one of each seed that has it."""
        return self.over_seeds(lambda run: run.last(name))

    def over_seeds(self, value: Callable[[Run], float | None]) -> list[float]:
        """A figure of the runs that count, one of each seed: of several runs with one seed, which differ in nothing
        that chance decides, their mean.
        """
        found: dict[tuple[int, ...], list[float]] = {}
        for run in self.counted:
            if (value_of := value(run)) is not None:
                found.setdefault(run.seeds, []).append(value_of)
        return [statistics.fmean(same) for same in found.values()]


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and, of several, the sample standard deviation (n - 1)."""
    found = results.spread(values)
    return found.mean, found.std if found.count > 1 else None


def group(runs: Sequence[Run]) -> list[Group]:
    """The runs in groups that differ in nothing but seeds and places, in the order of the first of each."""
    kinds: dict[tuple[str, Masking | None], list[Run]] = {}
    for run in runs:
        family = json.dumps([_experiment(run.config), *map(_weights, run.origins)])
        kinds.setdefault((family, run.masking), []).append(run)
    groups = [Group("", family, sorted(same, key=lambda run: run.seeds)) for (family, _), same in kinds.items()]
    for one in groups:
        one.label = common_label([run.label for run in one.runs])
    repeated = collections.Counter(one.label for one in groups)
    for one in groups:
        if repeated[one.label] > 1:
            one.label = f"{one.label} ({one.shown.label} …)"
    return groups


def _experiment(config: ConfigDict) -> list[tuple[str, Any]]:
    """The fields that make an experiment, without masking: a classifier's are only inherited from a recipe."""
    left_out = (*_NOT_THE_EXPERIMENT, *MASKING)
    return [
        (field, value)
        for field, value in config_lib.flatten(config)
        if not any(field == name or field.startswith(f"{name}.") for name in left_out)
    ]


def _weights(origin: Origin) -> list[tuple[str, Any]]:
    """What tells weights apart: the experiment that trained them, or else where they are."""
    return _experiment(origin.config) if origin.config else [("weights", str(origin.place or origin.init_from))]


def family_names(groups: Iterable[Group]) -> dict[str, str]:
    """What tells the families of these groups apart: the fields that differ; '' if it is one family."""
    families = {
        one.family: {(i, field): value for i, part in enumerate(json.loads(one.family)) for field, value in part}
        for one in groups
    }
    if len(families) <= 1:
        return dict.fromkeys(families, "")
    known = sorted(set.intersection(*map(set, families.values())))
    differ = [
        (i, field)
        for i, field in known
        if len({repr(fields[i, field]) for fields in families.values()}) > 1
        # What an origin has as the run itself has was handed on, and is named once.
        and (i == 0 or any(fields[i, field] != fields.get((0, field)) for fields in families.values()))
    ]
    names = {
        family: ", ".join(
            f"{'pretrained ' if i else ''}{field.rpartition('.')[2]} {fields[i, field]}" for i, field in differ
        )
        for family, fields in families.items()
    }
    repeated = collections.Counter(names.values())
    return {
        family: name if name and repeated[name] == 1 else f"{name} #{number}".strip()
        for number, (family, name) in enumerate(names.items(), start=1)
    }


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
    """Every `train_…`, `val_…` and `test_…` that was recorded, without those of single classes."""
    names = {name for run in runs for record in run.records for name in record}
    return sorted(name for name in names if re.match(r"(train|val|test)_[^/]+$", name))
