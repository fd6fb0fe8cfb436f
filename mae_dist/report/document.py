"""Tables of results in a Markdown document, made anew from the runs that the document names.

    <!-- results
    random: runs/random_s0 runs/random_s1
    grid: runs/grid_s*
    -->
    <!-- end of results -->

Each line is a row: its label, then patterns of workdirs relative to the document, of runs that differ in their seeds.
The probes and fine-tunings that began from them are found beside them. What stands between the two comments is
replaced. After `<!-- results against the first row` other rows show differences from the first, seed by seed.
"""

import dataclasses
import functools
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from etils import epath

from mae_dist import config as config_lib
from mae_dist.config import named
from mae_dist.errors import ConfigError, StorageFault
from mae_dist.metrics.results import spread
from mae_dist.report.runs import Run, collect
from mae_dist.storage import children_of, storage_errors
from mae_dist.weights.model_card import training_command

_BLOCK = re.compile(
    r"(?P<head><!-- results(?P<against> against the first row)?\n(?P<rows>.*?)-->\n)"
    r".*?(?P<end><!-- end of results -->)",
    re.DOTALL,
)
_NONE = "–"
_SPLITS = ("train", "val", "test")
# Metrics of a run of its own, and their titles.
_OWN = {"loss": "loss", "knn_top1": "kNN", "ridge_top1": "ridge", "top1": "top-1"}


@dataclasses.dataclass(frozen=True)
class Row:
    """Finished runs by their seeds, and those that began from them by what they are and by the seeds they began from.

    `own` and each of `followers` have one run per seed.
    """

    label: str
    own: dict[int, Run]
    followers: dict[str, dict[int, Run]]


def update(text: str, directory: epath.Path) -> str:
    """Returns a document with its tables made anew; workdirs are relative to `directory`.

    Raises:
      ConfigError: the document has no such block, or a line of one names no row.
      StorageFault: there is no finished run for a row.
    """
    if not _BLOCK.search(text):
        raise ConfigError("the document has no block `<!-- results … --> … <!-- end of results -->`; add one")

    @functools.cache
    def finished(parent: epath.Path) -> list[Run]:
        workdirs = [child for child in children_of(parent) if (child / "config.json").exists()]
        return [run for run in collect(workdirs)[0] if run.finished]

    def replace(block: re.Match[str]) -> str:
        rows = [_read_row(line, directory, finished) for line in block["rows"].splitlines() if line.strip()]
        parts = (_table(rows, bool(block["against"])), _all_splits(rows), _commands(rows))
        return "\n".join((block["head"], *(f"{part}\n" for part in parts if part), block["end"]))

    return _BLOCK.sub(replace, text)


def _read_row(line: str, directory: epath.Path, finished: Callable[[epath.Path], list[Run]]) -> Row:
    """Returns the row of a line; `finished` reads the finished runs in a directory."""
    label, colon, patterns = line.partition(":")
    if not colon or not patterns.strip():
        raise ConfigError(f"results: {line!r} is no row; write LABEL: WORKDIR [WORKDIR …]")
    with storage_errors(directory):
        places = sorted({place for pattern in patterns.split() for place in directory.glob(pattern)})
        parents = sorted({place.parent for place in places})
        everything = sorted((run for parent in parents for run in finished(parent)), key=lambda run: run.config.seed)
    # A pattern may also match those that began from its runs.
    own = {run.config.seed: run for run in everything if run.workdir in places and _origin(run) not in places}
    if not own:
        raise StorageFault(f"results: {line!r} names no finished run in {directory}; correct its patterns")
    seeds = {run.workdir: seed for seed, run in own.items()}
    followers: dict[str, dict[int, Run]] = {}
    for run in everything:
        origin = _origin(run)
        if origin in seeds:
            followers.setdefault(_kind(run), {})[seeds[origin]] = run
    return Row(label.strip(), own, dict(sorted(followers.items())))


def _origin(run: Run) -> epath.Path | None:
    """Returns the workdir beside a run that it began from, wherever that was trained."""
    return run.workdir.parent / config_lib.last_name(run.config.init_from) if run.config.init_from else None


def _kind(run: Run) -> str:
    """Returns what a training is that began from another."""
    if run.config.task == "probe":
        return {"linear": "linear probe", "mlp": "MLP probe"}[run.config.classify.head]
    return "fine-tuned" if run.config.task == "finetune" else run.config.task


def _values(runs: Mapping[int, Run], metric: str) -> dict[int, float]:
    """Returns the values of a metric by seed."""
    found = {seed: run.summary.get(metric) for seed, run in runs.items()}
    return {seed: value for seed, value in found.items() if isinstance(value, int | float)}


def _minus(values: Mapping[int, float], others: Mapping[int, float]) -> dict[int, float]:
    """Returns the differences of the seeds that are in both."""
    return {seed: value - others[seed] for seed, value in values.items() if seed in others}


def _cell(values: Mapping[int, float], metric: str, num_seeds: int, sign: str = "") -> str:
    """Returns mean ± sample standard deviation over seeds: an accuracy in percent, a loss as it is.

    `sign` is "+" for differences.
    """
    if not values:
        return _NONE
    found = spread(list(values.values()))
    factor, digits = (1, 4) if metric.endswith("loss") else (100, 1)
    text = f"{factor * found.mean:{sign}.{digits}f}"
    if found.count > 1:
        text += f" ± {factor * found.std:.{digits}f}"
    return text if len(values) == num_seeds else f"{text} (n = {len(values)})"


def _columns(rows: Sequence[Row], against_first: bool) -> Iterator[tuple[str, list[str]]]:
    """Yields title and cells of each metric that any row has, on test, where no row has that on validation."""

    def column(title: str, metric: str, runs: Callable[[Row], Mapping[int, Run]]) -> Iterator[tuple[str, list[str]]]:
        for split, shown in (("test", "test"), ("val", "validation")):
            found = [_values(runs(row), f"{split}_{metric}") for row in rows]
            if not any(found):
                continue
            cells = [_cell(values, metric, len(row.own)) for row, values in zip(rows, found, strict=True)]
            if against_first:
                differences = [_minus(values, found[0]) for values in found[1:]]
                cells[1:] = [_cell(d, metric, len(row.own), "+") for row, d in zip(rows[1:], differences, strict=True)]
            yield f"{title}, {shown}", cells
            return

    for metric, title in _OWN.items():
        yield from column(title, metric, lambda row: row.own)
    for kind in dict.fromkeys(kind for row in rows for kind in row.followers):
        yield from column(kind, "top1", lambda row, kind=kind: row.followers.get(kind, {}))


def _seeds(runs: Iterable[int]) -> str:
    seeds = sorted(runs)
    return f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else str(seeds[0])


def _hours(runs: Iterable[Run]) -> str:
    """Returns the mean hours of work of a run, without the time between a start's end and the next start."""
    secs = [sum(run.summary["goodput"]["secs"].values()) - run.summary["goodput"]["secs"]["away"] for run in runs]
    return f"{spread(secs).mean / 3600:.2f}"


def _commits(runs: Iterable[Run]) -> str:
    found = {run.summary.get("environment", {}).get("commit", "")[:7] for run in runs}
    return ", ".join(f"`{commit}`" if commit else _NONE for commit in sorted(found))


def _lines(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _table(rows: Sequence[Row], against_first: bool) -> str:
    columns = list(_columns(rows, against_first))
    heads = ["", *(title for title, _ in columns), "seeds", "hours", "commit"]
    body = []
    for number, row in enumerate(rows):
        cells = [column[number] for _, column in columns]
        body.append([row.label, *cells, _seeds(row.own), _hours(row.own.values()), _commits(row.own.values())])
    return _lines(heads, body)


def _all_splits(rows: Sequence[Row]) -> str:
    """Returns accuracies of heads on every split, folded; "" where none has more than one."""
    body = []
    for row in rows:
        for kind, runs in row.followers.items():
            found = {split: _values(runs, f"{split}_top1") for split in _SPLITS}
            if sum(map(bool, found.values())) > 1:
                cells = (_cell(found[split], "top1", len(row.own)) for split in _SPLITS)
                body.append([row.label, kind, *cells])
    if not body:
        return ""
    table = _lines(["", "", "training", "validation", "test"], body)
    return f'<details markdown="1"><summary>Heads on all splits</summary>\n\n{table}\n\n</details>'


def _commands(rows: Sequence[Row]) -> str:
    """Returns the command of the first seed of everything in the rows, folded."""
    lines = []
    for row in rows:
        for what, runs in (("", row.own), *row.followers.items()):
            lines.append(f"# {', '.join(filter(None, (row.label, what)))}; seed {_seeds(runs)}")
            config = runs[min(runs)].config
            base = config.name if config.name in named.names() else "default"
            lines.append(f"python -m mae_dist.main {shlex.join(training_command(config, base))}")
    text = "\n".join(lines)
    return f'<details markdown="1"><summary>Commands</summary>\n\n```sh\n{text}\n```\n\n</details>'
