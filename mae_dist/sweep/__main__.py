"""Trains all combinations of fields' values: `python -m mae_dist.sweep --config F --over config.a.b=x,y --seeds 3`.

Each combination and seed is a run of `mae_dist.main` in a workdir of its own under --out, followed by those of
`--then probe,finetune` by configs/recipes.py; `scratch`, which no masking changes, is trained once for all. The same
command again skips what is finished and continues the rest; a failure stops what begins from it and nothing else.
SIGTERM, SIGHUP and Ctrl-C are passed on to the runs, which save. `--out D --table` shows the results so far.
--config.a.b=x holds for all.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from mae_dist import cli, errors
from mae_dist.metrics import results
from mae_dist.resilience.lock import workdir_lock
from mae_dist.storage import check_checkpoints, local
from mae_dist.sweep import points
from mae_dist.sweep.points import Point
from mae_dist.sweep.runner import Runner, command, split_cores, trainings
from mae_dist.sweep.table import Table, describe, read_description
from mae_dist.task_kinds import kind_of

_OVER = flags.DEFINE_multi_string("over", [], "config.section.field=value,value,…; repeat it for further fields.")
_SEEDS = flags.DEFINE_integer("seeds", 1, "How many seeds, from the config's own on.", lower_bound=1)
_THEN = flags.DEFINE_list("then", [], "The trainings that follow at each point: probe, finetune, scratch.")
_SET = flags.DEFINE_multi_string(
    "set", [], "A field of one that follows, as probe.total_epochs=5; repeat it for others."
)
_JOBS = flags.DEFINE_integer("jobs", 1, "Runs at once, each on its part of the cores.")
_OUT = flags.DEFINE_string("out", None, "A local directory (default runs/sweep_<config.name>).", allow_override=True)
_TABLE = flags.DEFINE_bool("table", False, "Only write and print the table of what is finished in --out.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only print the points and their commands.")

_RECIPES = ("probe", "finetune", "scratch")


def sweep(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    if len(argv) > 1:
        raise errors.ConfigError(f"unexpected arguments {argv[1:]}; fields to sweep over are --over=config.a.b=x,y")
    if _TABLE.value:
        return show_table(_local(cli.required(_OUT)))
    base = cli.given_config()  # it need not be able to work as it is
    if base is None:
        raise errors.ConfigError("--config is missing: for example --config configs/quickstart.py")
    out = _local(_OUT.value or f"runs/sweep_{base.name}")
    check_checkpoints(out, saving=True)
    todo = _points(base, out)
    workable = [point for point in todo if not point.fault]
    faults = {point.name: f"cannot work: {point.fault}" for point in todo if point.fault}
    print(f"{len(todo)} points in {out}, {len(faults)} of them cannot work", flush=True)
    for name, fault in faults.items():
        print(f"  {name} {fault}", flush=True)
    if not workable:
        raise errors.ConfigError("no point of the sweep can work")
    if _DRY_RUN.value:
        for stages in trainings(workable).values():
            for stage in stages:
                print(shlex.join(command(stage)))
        return errors.EXIT_DONE
    cores = split_cores(_JOBS.value)
    with workdir_lock(out):
        describe(out, list(todo[0].fields), _THEN.value, [point.describe() for point in todo])
        runner = Runner(workable, cores)
        code = runner.run()
        show_table(out)
    for name, reason in (faults | runner.failures).items():
        print(f"FAILED {name}: {reason}", flush=True)
    return errors.EXIT_CONFIG if faults and code == errors.EXIT_DONE else code


def _local(value: str) -> epath.Path:
    return local(value, "--out", "a sweep is kept on a disk; write to a local path")


def _points(base: ConfigDict, out: epath.Path) -> list[Point]:
    """Returns the points that the flags ask for, each of them checked."""
    flag = flags.FLAGS["config"]
    if unknown := [name for name in _THEN.value if name not in _RECIPES]:
        raise errors.ConfigError(f"--then={unknown[0]} is not one of {', '.join(_RECIPES)}")
    if _THEN.value and not kind_of(base).has_decoder:
        raise errors.ConfigError(f"--then follows a pretraining, and task={base.task!r}")
    changes: dict[str, dict[str, str]] = {name: {} for name in _THEN.value}
    for text in _SET.value:
        field, _, value = text.partition("=")
        recipe, _, field = field.partition(".")
        if recipe not in changes or not field:
            raise errors.ConfigError(f"--set={text}: write <recipe>.<field>=value, with a recipe of --then")
        changes[recipe][field.removeprefix("config.")] = value
    return points.make_points(
        base,
        config_flags.get_config_filename(flag),
        config_flags.get_override_values(flag),
        points.parse_over(_OVER.value, base),
        range(base.seed, base.seed + _SEEDS.value),
        Path(out),
        changes,
    )


def show_table(out: epath.Path) -> int:
    """Writes and prints the table of a sweep, finished or not."""
    description = read_description(out)
    if description is None:
        raise errors.ConfigError(f"--out={out} is not the directory of a sweep: it has no sweep.json")

    def read(name: str) -> results.Result | None:
        try:
            return results.read_result(out / name)
        except errors.StorageFault as fault:
            print(f"left out: {fault}", flush=True)
            return None

    table = Table(description, read)
    table.write(out)
    print(f"{table.text()}\n{out / 'table.csv'}, table.json, figures/", flush=True)
    return errors.EXIT_DONE


if __name__ == "__main__":
    cli.run(sweep)
