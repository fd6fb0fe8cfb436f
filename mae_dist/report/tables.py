"""Tables of a report: results, cost, environments, configs side by side, checkpoints."""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime

from etils import epath

from mae_dist import config as config_lib
from mae_dist.checkpoint import digests, reader
from mae_dist.checkpoint.manifests import Manifests
from mae_dist.errors import UserError
from mae_dist.metrics.results import spread
from mae_dist.report.groups import Group, scalar_names
from mae_dist.report.page import Part, Row, Table, code, strong
from mae_dist.report.plot import duration
from mae_dist.report.runs import Run
from mae_dist.storage import storage_errors

# Head, value of a run, and the text of one value, or of several as their mean and sample standard deviation.
Column = tuple[str, Callable[[Run], float | None], Callable[[Sequence[float]], str]]
_NONE = "–"


def is_fraction(metric: str) -> bool:
    """True if a metric is a fraction of 1, shown in percent: an accuracy, also the lowest or median of classes."""
    return re.search(r"(top[15]|acc|accuracy)(_min|_median)?$", metric) is not None


def title_of(metric: str) -> str:
    """Returns "val kNN top-1" for val_knn_top1, "train top-1" for top1, "whole train top-1" for train_top1."""
    words = metric.replace("top1", "top-1").replace("top5", "top-5").replace("knn", "kNN").replace("_", " ")
    prefix = "train " if metric in ("loss", "top1") else "whole " if metric.startswith("train_") else ""
    return prefix + words


def long_title_of(metric: str) -> str:
    """Returns "Validation kNN top-1" for val_knn_top1."""
    words = re.sub(
        r"^(val|train) ", lambda split: {"val": "validation ", "train": "training "}[split[1]], title_of(metric)
    )
    return words[0].upper() + words[1:]


def percent(fractions: Sequence[float], digits: int = 2) -> str:
    """Returns "50.00 %", or of several fractions "60.00 ± 14.14 %"."""
    found = spread(fractions)
    std = f" ± {100 * found.std:.{digits}f}" if found.count > 1 else ""
    return f"{100 * found.mean:.{digits}f}{std} %"


def number(values: Sequence[float]) -> str:
    """Returns four digits, or with a deviation as many as its first two reach; thousands are separated."""
    found = spread(values)
    mean, std = found.mean, found.std
    if not std > 0:  # also NaN, of one value
        return f"{mean:,.0f}" if abs(mean) >= 1000 else f"{mean:.4g}" if mean == round(mean) else f"{mean:#.4g}"
    digits = max(0, 1 - math.floor(math.log10(std)))
    return f"{mean:,.{digits}f} ± {std:,.{digits}f}"


def _secs(values: Sequence[float]) -> str:
    found = spread(values)
    return duration(found.mean) + (f" ± {duration(found.std)}" if found.count > 1 else "")


def _metric(name: str) -> Column:
    return title_of(name), lambda run: run.last(name), percent if is_fraction(name) else number


def results(task: str, groups: Sequence[Group]) -> Table:
    """Returns the step and the last metrics of each run of one task."""
    known = ("loss", "val_loss", "test_loss", "top1", "val_top1", "test_top1")
    note = (
        "Last recorded values; training metrics are of one batch, unless of the whole split. Means ± sample standard "
        "deviation over seeds: only of finished runs as soon as there is one, and runs of one seed count as their mean."
    )

    def place(run: Run) -> list[str]:
        total = f" of {run.total_steps:,}" if run.total_steps else ""
        return [str(run.config.seed), f"{run.step:,}{total}{'' if run.finished else ', unfinished'}"]

    others = [name for name in scalar_names(groups) if name not in known]
    columns = [_metric(name) for name in (*known, *others)]
    return _grouped(f"Results: {task}", note, groups, ["seed", "step"], place, columns)


def cost(groups: Sequence[Group]) -> Table:
    """Returns when runs began, how fast they were, how long they took, and how much of the time was progress."""

    def began(run: Run) -> list[str]:
        return [f"{datetime.fromtimestamp(run.starts[0]['began'], tz=UTC):%Y-%m-%d %H:%M}" if run.starts else _NONE]

    columns: list[Column] = [
        ("images/s", lambda run: run.images_per_sec, number),
        ("time of work", lambda run: run.work_secs, _secs),
        ("productive", lambda run: run.ledger.get("productive_share"), lambda values: percent(values, 1)),
        ("restarts", lambda run: run.ledger["runs"] - 1 if run.ledger else None, number),
        ("steps done again", lambda run: run.ledger.get("steps_replayed"), number),
        ("MFU", lambda run: run.last("mfu"), number),
    ]
    note = (
        "Time of work: without the time between a run's end and its next start. Productive: the fraction of all time, "
        "including the time between, that went into steps that counted. Means are over seeds, as in the results."
    )
    return _grouped("Cost", note, groups, ["begun (UTC)"], began, columns)


def _grouped(
    caption: str,
    note: str,
    groups: Sequence[Group],
    head: Sequence[str],
    first: Callable[[Run], list[str]],
    columns: Sequence[Column],
) -> Table:
    """Returns a row for each run, above those of a group its means over seeds; columns without a value are left out.

    Args:
      head: of the cells that `first` returns.
    """
    columns = [column for column in columns if any(column[1](run) is not None for one in groups for run in one.runs)]
    rows: list[Row] = []
    for one in groups:
        several = len(one.runs) > 1
        if several:
            counted, seeds = (len({run.seeds for run in runs}) for runs in (one.counted, one.runs))
            cells = [f"n = {seeds}" if counted == seeds else f"n = {counted} of {seeds}", *[""] * (len(head) - 1)]
            for _, value, text in columns:
                found = one.over_seeds(value)
                fewer = f" (n = {len(found)})" if len(found) < counted else ""
                cells.append(text(found) + fewer if found else _NONE)
            rows.append(("mean", one.label, cells))
        for run in one.runs:
            values = [(value(run), text) for _, value, text in columns]
            cells = [*first(run), *(_NONE if value is None else text([value]) for value, text in values)]
            rows.append(("member" if several else "", run.label, cells))
    return Table(caption, ["run", *head, *(name for name, *_ in columns)], rows, note)


def sentence(run: Run) -> str:
    """Returns in words how far a run has come, and its results."""
    if not run.records:
        return f"{run.config.task}, nothing recorded yet"
    shown = [_metric(name) for name in ("test_top1", "val_top1", "test_loss", "val_loss", "loss")]
    values = [f"{title} {text([found])}" for title, value, text in shown if (found := value(run)) is not None]
    total = f" of {run.total_steps:,}" if run.total_steps else ""
    secs = f" in {duration(run.work_secs)} of work" if run.work_secs else ""
    state = f"{run.config.task}, {'finished' if run.finished else 'not finished'}: step {run.step:,}{total}{secs}"
    return f"{state}; {', '.join(values[:3])}".replace("top-", "top\N{NON-BREAKING HYPHEN}")


def environments(runs: Sequence[Run]) -> Part:
    """Returns each different environment of finished runs once."""
    found: dict[str, list[str]] = {}
    for run in runs:
        values = run.summary.get("environment") or {}
        text = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in sorted(values.items()))
        found.setdefault(text, []).append(run.label)
    missing = found.pop("", [])
    everybody = "all that have ended" if missing else "all"
    items: list[str] = [
        strong(everybody if len(found) == 1 and len(labels) > 1 else ", ".join(labels)) + f": {text}"
        for text, labels in found.items()
    ]
    if missing:
        items.append(f"{', '.join(missing)}: written when a run has ended")
    return Part("Environment", items=items)


def configs(runs: Sequence[Run]) -> list[Part]:
    """Returns the fields that differ, side by side, and the rest folded."""
    differ: list[Row] = []
    same: list[Row] = []
    flat = [dict(config_lib.flatten(run.config)) for run in runs]
    for field in flat[0]:
        values = [fields.get(field) for fields in flat]
        cells = [code(json.dumps(value, ensure_ascii=False)) for value in values]
        if any(value != values[0] for value in values):
            differ.append(("", field, cells))
        else:
            same.append(("", field, cells[:1]))
    heads = ["field", *(run.label for run in runs)]
    title = f"The {len(same)} fields with one value" if len(runs) > 1 else f"All {len(same)} fields"
    parts = [Part(tables=[Table("Fields that differ", heads, differ, wordy=range(1, len(heads)))])] if differ else []
    return [*parts, Part(title, tables=[Table(title, ["field", "value"], same, wordy=[1])], folded=True)]


def states(runs: Sequence[Run], *, arrays: bool) -> Part:
    """Returns the checkpoints of each run, verified; `arrays`: by the digests of their arrays too."""
    rows: list[Row] = []
    warnings = []
    for run in runs:
        try:
            with storage_errors(run.workdir):
                found = [*_checkpoints(run.workdir, arrays), *_quarantine(run.workdir)]
        except UserError as error:
            warnings.append(f"{run.label}: {error}")
            continue
        rows += [("", run.label, cells) for cells in found or [[_NONE, "", "", "no checkpoint yet"]]]
    note = "Files are compared with their manifest" + (", arrays with their digests." if arrays else ".")
    heads = ["run", "step", "size", "manifest", "condition"]
    return Part(warnings=warnings, tables=[Table("Checkpoints, verified now", heads, rows, note, wordy=[4])])


def _checkpoints(workdir: epath.Path, arrays: bool) -> Iterator[list[str]]:
    """Yields step, size, manifest and condition of each checkpoint; the run may be in progress."""
    manifests = Manifests(workdir)
    for step in reader.steps(workdir):
        path = workdir / "checkpoints" / str(step)
        try:
            faults = reader.condition(workdir, step) if arrays else manifests.faults(step)
            size = sum(file.stat().length for file in digests.files(path)) / 2**20
        except FileNotFoundError:
            if path.exists():
                raise
            continue  # superseded meanwhile
        if not path.exists():
            continue
        has_manifest = manifests.has(step)
        good = "good" if arrays else "files match" if has_manifest else "not verified: no manifest"
        condition = strong(f"CORRUPTED: {'; '.join(faults[:5])}") if faults else good
        yield [str(step), f"{size:,.1f} MiB", "yes" if has_manifest else "no", condition]


def _quarantine(workdir: epath.Path) -> list[list[str]]:
    reasons = Manifests(workdir).quarantined()
    return [[name, "", "", strong(f"in quarantine: {reason}")] for name, reason in reasons.items()]
