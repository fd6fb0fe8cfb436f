"""The points of a sweep: every combination of the values of some fields, under several seeds, and what runs at each."""

import ast
import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mae_dist import config as config_lib
from mae_dist.config import default, recipes
from mae_dist.config.stored import MASKING
from mae_dist.errors import ConfigError

Over = dict[str, list[Any]]  # field -> the values it takes


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training: `python -m mae_dist.main <arguments>`."""

    name: str  # the task, or the recipe that made it
    workdir: Path
    config: ConfigDict
    arguments: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Point:
    """One combination under one seed: its trainings, one after another."""

    name: str
    fields: dict[str, Any]
    seed: int
    stages: tuple[Stage, ...]
    fault: str  # why it cannot work, if it cannot

    def describe(self) -> dict[str, Any]:
        """Returns its entry in sweep.json."""
        follow = {stage.name: stage.workdir.name for stage in self.stages[1:]}
        return {"name": self.name, "fields": self.fields, "seed": self.seed, "fault": self.fault, "follow": follow}


def parse_over(texts: Sequence[str], base: ConfigDict) -> Over:
    """Parses `config.model.mask_ratio=.5,.75` as {"model.mask_ratio": [0.5, 0.75]}, in the types of `base`.

    Raises:
      ConfigError: no such field, a value that is not of its type, or one twice.
    """
    over: Over = {}
    for text in texts:
        field, sign, values = text.partition("=")
        field = field.strip().removeprefix("config.")
        if not sign:
            raise ConfigError(f"--over={text}: write --over config.section.field=value,value,…")
        if field in over or field == "seed":
            raise ConfigError(f"--over={text}: {'--seeds sets the seeds' if field == 'seed' else 'named twice'}")
        # At commas outside brackets: (2, 2),(4, 4) are two values.
        over[field] = [parse_value(base, field, value) for value in re.split(r",(?![^()]*\))", values)]
        if len({repr(value) for value in over[field]}) < len(over[field]):
            raise ConfigError(f"--over={text}: a value is named twice")
    return over


def parse_value(base: ConfigDict, field: str, text: str) -> Any:
    """Parses the value of a field, of the type that it has in `base`."""
    known = dict(config_lib.flatten(base))
    if field not in known:
        raise ConfigError(f"the config has no field {field!r}.{config_lib.nearest(field, list(known))}")
    try:
        value = text if isinstance(known[field], str) else ast.literal_eval(text.strip())
        return config_lib.get(_changed(base, {field: value}), field)
    except (ValueError, SyntaxError, TypeError) as error:
        kind = type(config_lib.get(base, field)).__name__
        raise ConfigError(f"{field}={text} is no {kind}, as {known[field]!r} is") from error


def _changed(config: ConfigDict, fields: Mapping[str, object]) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(dict(fields))
    return config


def make_points(
    base: ConfigDict,
    file: str,
    overrides: Mapping[str, object],
    over: Over,
    seeds: Sequence[int],
    out: Path,
    then: Mapping[str, Mapping[str, str]],
) -> list[Point]:
    """Returns a point for each combination of all values and seeds.

    Args:
      base: what `file` gives with `overrides`.
      file: the value of --config.
      overrides: field -> value, from the command line.
      over: of `parse_over`.
      seeds: the values of config.seed.
      out: the directory of their workdirs.
      then: the recipes of the trainings that follow, each with the fields to change after it (values as text).
    """
    short = _short_names(list(over))

    def name_of(fields: Mapping[str, object], seed: int) -> str:
        return ",".join([*(f"{short[field]}={_readable(value)}" for field, value in fields.items()), f"seed={seed}"])

    points = []
    for *values, seed in itertools.product(*over.values(), seeds):
        fields = dict(zip(over, values, strict=True))
        name = name_of(fields, seed)
        unmasked = name_of({field: value for field, value in fields.items() if field not in MASKING}, seed)
        arguments = _arguments(file, {**overrides, **fields, "seed": seed})
        first = Stage(base.task, out / name, _changed(base, {**fields, "seed": seed}), arguments)
        stages = (first, *(_next_stage(first, out / unmasked, recipe, changes) for recipe, changes in then.items()))
        points.append(Point(name, fields, seed, stages, _fault(stages)))
    if len({point.name for point in points}) < len(points):
        raise ConfigError("two points have the same name; sweep over values that differ in more than punctuation")
    return points


def _next_stage(first: Stage, unmasked: Path, name: str, changes: Mapping[str, str]) -> Stage:
    """Returns the training by a recipe from a pretraining.

    One that begins from nothing is the same for every masking of the pretraining: its workdir is beside `unmasked`.
    """
    known = dict(config_lib.flatten(default.get_config()))
    config = getattr(recipes, name)(first.config.copy_and_resolve_references())
    beside = first.workdir if config.init_from else unmasked
    if config.init_from:
        config.init_from = str(first.workdir)
    else:
        config = _changed(config, {field: known[field] for field in MASKING})
    config = _changed(config, {field: parse_value(config, field, text) for field, text in changes.items()})
    changed = [field for field, value in config_lib.flatten(config) if value != known[field]]
    arguments = _arguments("default", {field: config_lib.get(config, field) for field in changed})
    return Stage(name, beside.with_name(f"{beside.name},{name}"), config, arguments)


def _arguments(config: str, fields: Mapping[str, object]) -> tuple[str, ...]:
    return (f"--config={config}", *(f"--config.{field}={value}" for field, value in fields.items()))


def _fault(stages: Sequence[Stage]) -> str:
    for stage in stages:
        try:
            config_lib.validate(stage.config)
        except ConfigError as error:
            return str(error).partition("\n  - ")[2]
    return ""


def _short_names(fields: Sequence[str]) -> dict[str, str]:
    """Returns the last part of each field's name, or all of it where another field ends so."""
    last = [field.rpartition(".")[2] for field in fields]
    return {field: name if last.count(name) == 1 else field for field, name in zip(fields, last, strict=True)}


def _readable(value: object) -> str:
    """Returns a value as part of a file's name."""
    text = "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return re.sub(r"[^\w.+-]", "_", text)
