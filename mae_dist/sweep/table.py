"""The outcome of a sweep over its seeds: a table as text, CSV and JSON, and a figure for each swept field."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from mae_dist.metrics.results import METRICS, Result, Spread, spread
from mae_dist.storage import read_text, set_aside, storage_errors, write_bytes_atomically, write_text_atomically

_SWEEP_FILE = "sweep.json"
_CLASSIFIED = ("train_top1", "val_top1", "test_top1")  # what the trainings that follow the first are for


def describe(out: epath.Path, fields: Sequence[str], then: Sequence[str], points: Sequence[Mapping[str, Any]]) -> None:
    """Writes sweep.json, from which alone the table can be made: what is swept and where each point is.

    One that has points which are not of this sweep is kept beside it.
    """
    text = json.dumps({"fields": list(fields), "then": list(then), "points": list(points)}, indent=2)
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        before = read_text(out / _SWEEP_FILE)
        if before and not {point["name"] for point in json.loads(before)["points"]} <= {p["name"] for p in points}:
            set_aside(out / _SWEEP_FILE)
        write_text_atomically(out / _SWEEP_FILE, text + "\n")


def read_description(out: epath.Path) -> dict[str, Any] | None:
    """What `describe` wrote, if it did."""
    with storage_errors(out):
        text = read_text(out / _SWEEP_FILE)
    return json.loads(text) if text else None


class Table:
    """One row for each combination of the swept values.

    Attributes:
      rows: `fields` (name -> value), `seeds` (finished so far), `of` (all), `fault` (why it cannot work, or "") and
        `values` (metric -> its value at each finished seed).
      metrics: those that any row has, in order.
    """

    def __init__(self, description: Mapping[str, Any], read: Callable[[str], Result | None]):
        """Collects the results.

        Args:
          description: of `read_description`.
          read: name of a workdir -> what its run came to.
        """
        self.fields: list[str] = description["fields"]
        order = [*METRICS, *(f"{then}_{name}" for then in description["then"] for name in _CLASSIFIED)]
        rows: dict[str, dict[str, Any]] = {}
        for point in description["points"]:
            row = rows.setdefault(
                json.dumps(point["fields"]),
                {"fields": point["fields"], "seeds": 0, "of": 0, "fault": point["fault"], "values": {}},
            )
            result = read(point["name"])
            found = dict(result.metrics) if result else {}
            row["of"] += 1
            row["seeds"] += result is not None
            for then in description["then"]:
                # An older sweep.json names no workdirs of these: they lay beside the first, each under its name.
                follow = point.get("follow", {}).get(then, f"{point['name']},{then}")
                if result := read(follow):
                    found |= {f"{then}_{name}": result.metrics[name] for name in _CLASSIFIED if name in result.metrics}
            for name, value in found.items():
                row["values"].setdefault(name, []).append(value)
        self.rows = list(rows.values())
        self.metrics = [name for name in order if any(name in row["values"] for row in self.rows)]

    def cell(self, row: Mapping[str, Any], metric: str) -> Spread | None:
        values = row["values"].get(metric)
        return spread(values) if values else None

    def text(self) -> str:
        """For people: aligned, mean ± sample standard deviation over seeds."""
        lines = [[*(field.rpartition(".")[2] for field in self.fields), "seeds", *self.metrics]]
        for row in self.rows:
            seeds = "cannot work" if row["fault"] else f"{row['seeds']}/{row['of']}"
            cells = [str(self.cell(row, metric) or "-") for metric in self.metrics]
            lines.append([*(_shown(value) for value in row["fields"].values()), seeds, *cells])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )

    def write(self, out: epath.Path) -> None:
        """table.csv, table.json and figures/<field>.png."""
        header = [name for metric in self.metrics for name in (metric, f"{metric}_std", f"{metric}_count")]
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow([*self.fields, "seeds", *header])
        described = []
        for row in self.rows:
            cells = {metric: found for metric in self.metrics if (found := self.cell(row, metric))}
            line = [*map(_shown, row["fields"].values()), row["seeds"]]
            for metric in self.metrics:
                found = cells.get(metric)
                line += [found.mean, found.std if found.count > 1 else "", found.count] if found else ["", "", ""]
            writer.writerow(line)
            spreads = {
                metric: {
                    "mean": found.mean,
                    "std": found.std if found.count > 1 else None,
                    "values": row["values"][metric],
                }
                for metric, found in cells.items()
            }
            described.append({"fields": row["fields"], "seeds": row["seeds"], "metrics": spreads})
        with storage_errors(out):
            write_text_atomically(out / "table.csv", buffer.getvalue())
            write_text_atomically(out / "table.json", json.dumps(described, indent=2) + "\n")
            for field in self.fields if self.metrics else []:
                (out / "figures").mkdir(exist_ok=True)
                picture = io.BytesIO()
                self.figure(field).savefig(picture, format="png")
                write_bytes_atomically(out / "figures" / f"{field}.png", picture.getvalue())

    def figure(self, field: str) -> Any:
        """A matplotlib Figure: a panel for each metric against `field`, a line for each combination of the others."""
        from matplotlib.figure import Figure

        columns = min(3, len(self.metrics))
        rows = -(-len(self.metrics) // columns)
        figure = Figure(figsize=(4.2 * columns, 3.2 * rows + 0.4), dpi=100, layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        labels = list(dict.fromkeys(_shown(row["fields"][field]) for row in self.rows))  # where it is no number
        values = [row["fields"][field] for row in self.rows]
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        others = dict.fromkeys(self._others(row, field) for row in self.rows)
        for panel, metric in zip(panels, self.metrics, strict=False):
            for other in others:
                found = [
                    (value if numeric else labels.index(_shown(value)), cell)
                    for row, value in zip(self.rows, values, strict=True)
                    if self._others(row, field) == other and (cell := self.cell(row, metric))
                ]
                found.sort(key=lambda pair: pair[0])
                errors = [cell.std if cell.count > 1 else 0.0 for _, cell in found]
                xs, means = [x for x, _ in found], [cell.mean for _, cell in found]
                panel.errorbar(xs, means, errors, marker="o", linestyle="-" if numeric else "", capsize=3, label=other)
            panel.set(title=metric, xlabel=field)
            if not numeric:
                panel.set_xticks(range(len(labels)), labels)
        for panel in panels[len(self.metrics) :]:
            panel.set_axis_off()
        if len(others) > 1:
            handles, names = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), fontsize=8)
        return figure

    def _others(self, row: Mapping[str, Any], field: str) -> str:
        pairs = ((name.rpartition(".")[2], value) for name, value in row["fields"].items() if name != field)
        return ", ".join(f"{name} {_shown(value)}" for name, value in pairs)


def _shown(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)
