"""A report's tables: results, cost, environments, configs side by side, checkpoints."""

import json
import math
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from mae_dist.errors import UserError
from mae_dist.report.groups import Group, differing_fields, mean_std, scalar_names
from mae_dist.report.page import Content, Html, Row, table, tag, warning
from mae_dist.report.plot import duration
from mae_dist.report.runs import Run, checkpoints

Value = Callable[[Run], float | None]
Column = tuple[str, Value, Callable[[float, float | None], str]]  # head, value of a run, (mean, std) as text
_NONE = "–"


def is_share(metric: str) -> bool:
    """Whether it is written as a share of 1 and read in percent: an accuracy, also the lowest or median of classes."""
    return re.search(r"(top[15]|acc|accuracy)(_min|_median)?$", metric) is not None


def title_of(metric: str) -> str:
    """val_knn_top1 -> val kNN top-1; top1 -> train top-1, of a batch, and train_top1 -> whole train top-1."""
    words = metric.replace("top1", "top-1").replace("top5", "top-5").replace("knn", "kNN").replace("_", " ")
    prefix = "train " if metric in ("loss", "top1") else "whole " if metric.startswith("train_") else ""
    return prefix + words


def long_title_of(metric: str) -> str:
    """val_knn_top1 -> Validation kNN top-1."""
    words = title_of(metric).replace("val ", "validation ", 1)
    return words[0].upper() + words[1:]


def percent(mean: float, std: float | None = None) -> str:
    return f"{100 * mean:.2f} %" if std is None else f"{100 * mean:.2f} ± {100 * std:.2f} %"


def number(mean: float, std: float | None = None) -> str:
    """Four digits, or with a deviation as many as its first two reach; thousands kept apart."""
    if not std:
        return f"{mean:,.0f}" if abs(mean) >= 1000 else f"{mean:.4g}" if mean == round(mean) else f"{mean:#.4g}"
    decimals = max(0, 1 - math.floor(math.log10(std)))
    return f"{mean:,.{decimals}f} ± {std:,.{decimals}f}"


def _secs(mean: float, std: float | None = None) -> str:
    return duration(mean) if std is None else f"{duration(mean)} ± {duration(std)}"


def _metric(name: str) -> Column:
    return title_of(name), lambda run: run.last(name), percent if is_share(name) else number


def results(groups: Sequence[Group]) -> list[Html]:
    """Where each run is and what it came to, a table for each task."""
    known = ("loss", "val_loss", "test_loss", "top1", "val_top1", "test_top1")
    note = (
        "Last recorded values; those of training are of one batch, unless of the whole split. Means ± sample "
        "standard deviation over seeds: of finished runs alone as soon as there is one, and runs of one seed count as "
        "their mean."
    )
    tables = []
    for task in dict.fromkeys(one.task for one in groups):
        some = [one for one in groups if one.task == task]
        others = [name for name in scalar_names(run for one in some for run in one.runs) if name not in known]
        columns = [_metric(name) for name in (*known, *others)]
        tables.append(_grouped(f"Results: {task}", note, some, ["seed", "step"], _place, columns))
    return tables


def _place(run: Run) -> list[Content]:
    of = f" of {run.total_steps:,}" if run.total_steps else ""
    return [str(run.config.seed), f"{run.step:,}{of}{'' if run.finished else ', unfinished'}"]


def cost(groups: Sequence[Group]) -> Html:
    """When, how fast, how long, and how much of the time was progress."""

    def of_ledger(name: str) -> Value:
        return lambda run: run.ledger.get(name)

    def restarts(run: Run) -> float | None:
        return run.ledger["runs"] - 1 if run.ledger else None

    def share(mean: float, std: float | None = None) -> str:
        return f"{100 * mean:.1f} %" if std is None else f"{100 * mean:.1f} ± {100 * std:.1f} %"

    columns: list[Column] = [
        ("images/s", lambda run: run.images_per_sec, number),
        ("time of work", lambda run: run.hours and 3600 * run.hours, _secs),
        ("productive", of_ledger("productive_share"), share),
        ("restarts", restarts, number),
        ("updates done again", of_ledger("steps_replayed"), number),
        ("MFU", lambda run: run.last("mfu"), number),
    ]
    note = (
        "Time of work: without that between a run's end and its next start. Productive: the share of all time, that "
        "between included, which went into updates that counted. Means are over seeds, as those of the results."
    )
    return _grouped("Cost", note, groups, ["begun (UTC)"], lambda run: [began(run)], columns)


def began(run: Run) -> str:
    return f"{datetime.fromtimestamp(run.span[0], tz=UTC):%Y-%m-%d %H:%M}" if run.span else _NONE


def _grouped(
    caption: str,
    note: str,
    groups: Sequence[Group],
    head: Sequence[str],
    first: Callable[[Run], list[Content]],
    columns: Sequence[Column],
) -> Html:
    """A row for each run, and above those of a group one of means over seeds; columns without a value are left out."""
    columns = [column for column in columns if any(column[1](run) is not None for one in groups for run in one.runs)]

    def mean(one: Group, column: Column, seeds: int) -> str:
        _, value, text = column
        found = one.over_seeds(value)
        few = f" (n = {len(found)})" if len(found) < seeds else ""
        return text(*mean_std(found)) + few if found else _NONE

    def alone(run: Run, column: Column) -> str:
        _, value, text = column
        return _NONE if (value_of := value(run)) is None else text(value_of, None)

    rows: list[Row] = []
    for one in groups:
        several = len(one.runs) > 1
        if several:
            counted, seeds = (len({run.seeds for run in runs}) for runs in (one.counted, one.runs))
            n = f"n = {seeds}" if counted == seeds else f"n = {counted} of {seeds}"
            blank = [n, *[""] * (len(head) - 1)]
            rows.append(("mean", [one.label, *blank, *(mean(one, column, counted) for column in columns)]))
        rows += [
            ("member" if several else "", [run.label, *first(run), *(alone(run, column) for column in columns)])
            for run in one.runs
        ]
    return table(caption, ["run", *head, *(name for name, *_ in columns)], rows, note=note)


def sentence(run: Run) -> str:
    """What a run came to, or how far it has come, in words."""
    total = f" of {run.total_steps:,}" if run.total_steps else ""
    state = "finished" if run.finished else "not finished"
    if not run.records:
        return f"{run.config.task}, nothing recorded yet"
    shown = ("test_top1", "val_top1", "test_loss", "val_loss", "loss")
    values = [f"{title_of(name)} {(percent if is_share(name) else number)(value)}"
              for name in shown if (value := run.last(name)) is not None][:3]  # fmt: skip
    secs = f" in {duration(3600 * run.hours)} of work" if run.hours else ""
    values = [value.replace("top-", "top\N{NON-BREAKING HYPHEN}") for value in values]
    return f"{run.config.task}, {state}: step {run.step:,}{total}{secs}; {', '.join(values)}"


def environments(runs: Sequence[Run]) -> Content:
    """What finished runs ran with, each different one once."""
    found: dict[str, list[str]] = {}
    for run in runs:
        if run.summary.get("environment"):
            found.setdefault(json.dumps(run.summary["environment"], sort_keys=True), []).append(run.label)
    missing = [run.label for run in runs if not run.summary.get("environment")]
    items: list[Content] = []
    for text, labels in found.items():
        values = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in json.loads(text).items())
        ended = len(labels) + len(missing) == len(runs)
        which = ("all that have ended" if missing else "all") if ended and len(labels) > 1 else ", ".join(labels)
        items.append(tag("li", tag("strong", which), f": {values}"))
    if missing:
        items.append(tag("li", f"{', '.join(missing)}: written when a run has ended"))
    return [tag("h3", "Environment"), tag("ul", items, class_="plain soft")]


def configs(runs: Sequence[Run]) -> Content:
    """Fields that differ, side by side; the rest folded."""
    differ, same = differing_fields(runs)
    heads = ["field", *(run.label for run in runs)]
    rows: list[Row] = [("", [field, *map(_value, values)]) for field, values in differ]
    columns = range(1, len(heads))
    rest: list[Row] = [("", [field, _value(value)]) for field, value in same]
    title = f"The {len(same)} fields with one value" if len(runs) > 1 else f"All {len(same)} fields"
    return [
        table("Fields that differ", heads, rows, left=columns) if differ else None,
        tag("details", tag("summary", title), table(title, ["field", "value"], rest, left=[1])),
    ]


def _value(value: object) -> Content:
    return tag("code", json.dumps(value, ensure_ascii=False))


def states(runs: Sequence[Run], *, arrays: bool) -> Content:
    """The checkpoints of each run and whether they are what was saved."""
    rows: list[Row] = []
    faults: list[Content] = []
    for run in runs:
        try:
            found, quarantined = checkpoints(run.workdir, arrays=arrays)
        except UserError as error:
            faults.append(warning(f"{run.label}: {error}"))
            continue
        for state in found:
            good = "good" if arrays else "files as sealed" if state.sealed else "not verified: no seal"
            told = f"DAMAGED: {'; '.join(state.faults[:5])}" if state.faults else good
            rows.append(("", [run.label, state.place, f"{state.mebibytes:,.1f} MiB", "yes" if state.sealed else "no",
                              tag("strong", told) if state.faults else told]))  # fmt: skip
        for place, reason in quarantined.items():
            rows.append(("", [run.label, place, "", "", tag("strong", f"in quarantine: {reason}")]))
        if not found and not quarantined:
            rows.append(("", [run.label, _NONE, "", "", "no checkpoint yet"]))
    note = "Files against their seals, arrays against their digests." if arrays else "Files against their seals."
    heads = ["run", "step", "size", "sealed", "condition"]
    return [faults, table("Checkpoints, verified now", heads, rows, note=note, left=[4])]
