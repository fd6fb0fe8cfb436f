"""Tables of results in a Markdown document, made anew from the runs that the document names.

    <!-- results
    random: runs/random_s0 runs/random_s1
    grid: runs/grid_s*
    -->
    <!-- end of results -->

Each line is a row: its label, then patterns of workdirs relative to the document, of runs that differ in their seeds.
The probes and fine-tunings that began from them are found beside them. What stands between the two comments is
replaced.
"""

import dataclasses
import functools
import re
import shlex
from collections.abc import Callable, Iterator, Sequence

from etils import epath

from mae_dist import config as config_lib
from mae_dist.config import named
from mae_dist.errors import ConfigError, StorageFault
from mae_dist.metrics.results import spread
from mae_dist.report.runs import Run, collect
from mae_dist.storage import children_of, storage_errors
from mae_dist.weights.model_card import training_command

_BLOCK = re.compile(r"(?P<head><!-- results\n(?P<rows>.*?)-->\n).*?(?P<end><!-- end of results -->)", re.DOTALL)
_NONE = "–"
_SPLITS = ("train", "val", "test")
# Metrics of a run of its own, and their titles.
_OWN = {"loss": "loss", "knn_top1": "kNN", "ridge_top1": "ridge", "top1": "top-1"}


@dataclasses.dataclass(frozen=True)
class Row:
    """Finished runs that differ in their seeds, and those that began from them, by what they are."""

    label: str
    runs: list[Run]
    followers: dict[str, list[Run]]


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
        parts = (_table(rows), _all_splits(rows), _commands(rows))
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
    runs = [run for run in everything if run.workdir in places and _origin(run) not in places]
    if not runs:
        raise StorageFault(f"results: {line!r} names no finished run in {directory}; correct its patterns")
    followers: dict[str, list[Run]] = {}
    for run in everything:
        if _origin(run) in {one.workdir for one in runs}:
            followers.setdefault(_kind(run), []).append(run)
    return Row(label.strip(), runs, dict(sorted(followers.items())))


def _origin(run: Run) -> epath.Path | None:
    """Returns the workdir beside a run that it began from, wherever that was trained."""
    return run.workdir.parent / config_lib.last_name(run.config.init_from) if run.config.init_from else None


def _kind(run: Run) -> str:
    """Returns what a training is that began from another."""
    if run.config.task == "probe":
        return {"linear": "linear probe", "mlp": "MLP probe"}[run.config.classify.head]
    return "fine-tuned" if run.config.task == "finetune" else run.config.task


def _values(runs: Sequence[Run], metric: str) -> list[float]:
    return [run.summary[metric] for run in runs if isinstance(run.summary.get(metric), int | float)]


def _cell(values: Sequence[float], metric: str, num_seeds: int) -> str:
    """Returns mean ± sample standard deviation: an accuracy in percent, a loss as it is."""
    if not values:
        return _NONE
    found = spread(values)
    factor, digits = (1, 4) if metric.endswith("loss") else (100, 1)
    text = f"{factor * found.mean:.{digits}f}" + (f" ± {factor * found.std:.{digits}f}" if found.count > 1 else "")
    return text if len(values) == num_seeds else f"{text} (n = {len(values)})"


def _columns(rows: Sequence[Row]) -> Iterator[tuple[str, Callable[[Row], str]]]:
    """Yields title and cells of each metric that any row has, on test, where no row has that on validation."""

    def column(title: str, metric: str, runs: Callable[[Row], list[Run]]) -> Iterator[tuple[str, Callable[[Row], str]]]:
        for split, shown in (("test", "test"), ("val", "validation")):
            name = f"{split}_{metric}"
            if any(_values(runs(row), name) for row in rows):
                yield f"{title}, {shown}", lambda row, name=name: _cell(_values(runs(row), name), metric, len(row.runs))
                return

    for metric, title in _OWN.items():
        yield from column(title, metric, lambda row: row.runs)
    for kind in dict.fromkeys(kind for row in rows for kind in row.followers):
        yield from column(kind, "top1", lambda row, kind=kind: row.followers.get(kind, []))


def _seeds(runs: Sequence[Run]) -> str:
    seeds = [run.config.seed for run in runs]
    return f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else str(seeds[0])


def _hours(runs: Sequence[Run]) -> str:
    """Returns the mean hours of work of a run, without the time between a start's end and the next start."""
    secs = [sum(run.summary["goodput"]["secs"].values()) - run.summary["goodput"]["secs"]["away"] for run in runs]
    return f"{spread(secs).mean / 3600:.2f}"


def _commits(runs: Sequence[Run]) -> str:
    found = {run.summary.get("environment", {}).get("commit", "")[:7] for run in runs}
    return ", ".join(f"`{commit}`" if commit else _NONE for commit in sorted(found))


def _lines(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _table(rows: Sequence[Row]) -> str:
    columns = list(_columns(rows))
    heads = ["", *(title for title, _ in columns), "seeds", "hours", "commit"]
    body = [
        [row.label, *(cell(row) for _, cell in columns), _seeds(row.runs), _hours(row.runs), _commits(row.runs)]
        for row in rows
    ]
    return _lines(heads, body)


def _all_splits(rows: Sequence[Row]) -> str:
    """Returns accuracies of heads on every split, folded; "" where none has more than one."""
    body = []
    for row in rows:
        for kind, runs in row.followers.items():
            found = {split: _values(runs, f"{split}_top1") for split in _SPLITS}
            if sum(map(bool, found.values())) > 1:
                body.append([row.label, kind, *(_cell(found[split], "top1", len(row.runs)) for split in _SPLITS)])
    if not body:
        return ""
    table = _lines(["", "", "training", "validation", "test"], body)
    return f'<details markdown="1"><summary>Heads on all splits</summary>\n\n{table}\n\n</details>'


def _commands(rows: Sequence[Row]) -> str:
    """Returns the command of the first seed of everything in the rows, folded."""
    lines = []
    for row in rows:
        for what, runs in (("", row.runs), *row.followers.items()):
            lines.append(f"# {', '.join(filter(None, (row.label, what)))}; seed {_seeds(runs)}")
            config = runs[0].config
            base = config.name if config.name in named.names() else "default"
            lines.append(f"python -m mae_dist.main {shlex.join(training_command(config, base))}")
    text = "\n".join(lines)
    return f'<details markdown="1"><summary>Commands</summary>\n\n```sh\n{text}\n```\n\n</details>'
