"""The results of a sweep over its seeds: a table as text, CSV and JSON, and a figure for each swept field."""

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from mae_dist.metrics.results import METRICS, Result, Spread, spread
from mae_dist.storage import read_text, set_aside, storage_errors, write_bytes_atomically, write_text_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SWEEP_FILE = "sweep.json"
_CLASSIFIED = ("train_top1", "val_top1", "test_top1")  # the metrics of the trainings that follow the first


def describe(
    out: epath.Path, fields: Sequence[str], then: Sequence[str], points: Sequence[Mapping[str, object]]
) -> None:
    """Writes sweep.json, which alone is needed to make the table: the swept fields, and where each point is.

    Keeps one that has points of another sweep beside it.
    """
    text = json.dumps({"fields": list(fields), "then": list(then), "points": list(points)}, indent=2)
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        before = read_text(out / _SWEEP_FILE)
        if before and not {point["name"] for point in json.loads(before)["points"]} <= {p["name"] for p in points}:
            set_aside(out / _SWEEP_FILE)
        write_text_atomically(out / _SWEEP_FILE, text + "\n")


def read_description(out: epath.Path) -> dict[str, Any] | None:
    """Returns what `describe` wrote, if it did."""
    with storage_errors(out):
        text = read_text(out / _SWEEP_FILE)
    return json.loads(text) if text else None


@dataclasses.dataclass
class Row:
    """One combination of the swept values: `values` are those of each metric at the seeds that are finished."""

    fields: dict[str, Any]
    fault: str  # why it cannot work, or ""
    num_seeds: int = 0
    num_finished: int = 0
    values: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    @property
    def spreads(self) -> dict[str, Spread]:
        return {metric: spread(values) for metric, values in self.values.items()}

    def label(self, without: str) -> str:
        """Returns the values of all fields but one."""
        pairs = ((name.rpartition(".")[2], value) for name, value in self.fields.items() if name != without)
        return ", ".join(f"{name} {_shown(value)}" for name, value in pairs)


class Table:
    """One row for each combination of the swept values, and the metrics that any row has, in order."""

    def __init__(self, description: Mapping[str, Any], read: Callable[[str], Result | None]):
        """Collects the results.

        Args:
          description: of `read_description`.
          read: name of a workdir -> the result of its run, None if it is not finished.
        """
        self.fields: list[str] = description["fields"]
        rows: dict[str, Row] = {}
        for point in description["points"]:
            row = rows.setdefault(json.dumps(point["fields"]), Row(point["fields"], point["fault"]))
            result = read(point["name"])
            found = dict(result.metrics) if result else {}
            row.num_seeds += 1
            row.num_finished += result is not None
            for then in description["then"]:
                # An older sweep.json names no workdirs of these: they lay beside the first, each under its name.
                follow = point.get("follow", {}).get(then, f"{point['name']},{then}")
                if result := read(follow):
                    found |= {f"{then}_{name}": result.metrics[name] for name in _CLASSIFIED if name in result.metrics}
            for name, value in found.items():
                row.values.setdefault(name, []).append(value)
        self.rows = list(rows.values())
        order = [*METRICS, *(f"{then}_{name}" for then in description["then"] for name in _CLASSIFIED)]
        self.metrics = [name for name in order if any(name in row.values for row in self.rows)]

    def text(self) -> str:
        """Returns the table for people: aligned, mean ± sample standard deviation over seeds."""
        lines = [[*(field.rpartition(".")[2] for field in self.fields), "seeds", *self.metrics]]
        for row in self.rows:
            seeds = "cannot work" if row.fault else f"{row.num_finished}/{row.num_seeds}"
            cells = [str(row.spreads.get(metric, "-")) for metric in self.metrics]
            lines.append([*map(_shown, row.fields.values()), seeds, *cells])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

    def write(self, out: epath.Path) -> None:
        """Writes table.csv, table.json and figures/<field>.png."""
        buffer = io.StringIO()
        names = [name for metric in self.metrics for name in (metric, f"{metric}_std", f"{metric}_count")]
        writer = csv.DictWriter(buffer, [*self.fields, "seeds", *names], lineterminator="\n")
        writer.writeheader()
        described = []
        for row in self.rows:
            line = {field: _shown(value) for field, value in row.fields.items()} | {"seeds": row.num_finished}
            metrics = {}
            for metric, found in row.spreads.items():
                std = found.std if found.count > 1 else None
                metrics[metric] = {"mean": found.mean, "std": std, "values": row.values[metric]}
                line |= {metric: found.mean, f"{metric}_std": std, f"{metric}_count": found.count}
            writer.writerow(line)
            described.append({"fields": row.fields, "seeds": row.num_finished, "metrics": metrics})
        with storage_errors(out):
            write_text_atomically(out / "table.csv", buffer.getvalue())
            write_text_atomically(out / "table.json", json.dumps(described, indent=2) + "\n")
            for field in self.fields if self.metrics else []:
                (out / "figures").mkdir(exist_ok=True)
                picture = io.BytesIO()
                self.figure(field).savefig(picture, format="png")
                write_bytes_atomically(out / "figures" / f"{field}.png", picture.getvalue())

    def figure(self, field: str) -> "Figure":
        """Draws a panel for each metric against `field`, with a line for each combination of the other fields."""
        from matplotlib.figure import Figure

        columns = min(3, len(self.metrics))
        rows = -(-len(self.metrics) // columns)
        figure = Figure(figsize=(4.2 * columns, 3.2 * rows + 0.4), dpi=100, layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        values = [row.fields[field] for row in self.rows]
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        in_order = sorted(self.rows, key=lambda row: row.fields[field]) if numeric else self.rows
        labels = dict.fromkeys(row.label(field) for row in self.rows)
        for panel, metric in zip(panels, self.metrics, strict=False):
            for label in labels:
                found = [row for row in in_order if row.label(field) == label and metric in row.values]
                xs = [row.fields[field] if numeric else _shown(row.fields[field]) for row in found]
                cells = [row.spreads[metric] for row in found]
                means, stds = [cell.mean for cell in cells], [cell.std for cell in cells]
                panel.errorbar(xs, means, stds, marker="o", linestyle="-" if numeric else "", capsize=3, label=label)
            panel.set(title=metric, xlabel=field)
        for panel in panels[len(self.metrics) :]:
            panel.set_axis_off()
        if len(labels) > 1:
            handles, names = panels[0].get_legend_handles_labels()
            figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), fontsize=8)
        return figure


def _shown(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)
