"""One self-contained HTML page about runs: `python -m mae_dist.report W1 [W2 …] --out report.html [--figures DIR]`.

W is the workdir of a run, finished or not, or a directory whose children are such. The page has results, means over
seeds, curves, where the time went, pictures, and of every model's newest good checkpoint its predictions and features.
It loads nothing from anywhere and has no script.
"""

import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from absl import flags, logging
from etils import epath

from mae_dist import cli, errors
from mae_dist.cpu import start
from mae_dist.evaluation.pictures import note_on_moments
from mae_dist.report import pictures, tables
from mae_dist.report.figures import against_masking, curve, line_styles, time_bars
from mae_dist.report.groups import Group, group, scalar_names
from mae_dist.report.model import Viewer, embed
from mae_dist.report.page import Content, Html, document, figure, legend, picture, plots, section, tag, warning
from mae_dist.report.plot import Line, Plot, write_files
from mae_dist.report.runs import Run, collect, find_workdirs
from mae_dist.storage import absolute, storage_errors, write_text_atomically

_OUT = flags.DEFINE_string("out", None, "The HTML file to write.", allow_override=True)
_FIGURES = flags.DEFINE_string("figures", "", "Also write each figure as PNG and SVG into this directory.")
_QUICK = flags.DEFINE_bool("quick", False, "Leave out what needs models or data.")
_DATA_DIR = flags.DEFINE_string(
    "data_dir", "", "Where TFDS keeps data sets, if not where the runs had it.", allow_override=True
)
_MAX_IMAGES = flags.DEFINE_integer("max_images", 10_000, "The most of a split that a model sees.", lower_bound=1)

_CURVES: dict[str, tuple[str, dict[str, Any]]] = {  # by metric: title, and the options of `figures.curve`
    "loss": ("Training loss", {"log": True, "smooth": True}),
    "val_loss": ("Validation loss, ◆ test", {"log": True, "final": "test_loss"}),
    "top1": ("Training top-1", {"percent": True, "smooth": True}),
    "val_top1": ("Validation top-1, ◆ test", {"percent": True, "final": "test_top1"}),
}
_RATES: dict[str, tuple[str, dict[str, Any]]] = {
    "lr": ("Learning rate", {}),
    "images_per_sec": ("Images per second", {}),
}


def report(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    if len(argv) < 2:
        raise errors.ConfigError("which runs? Give workdirs: python -m mae_dist.report W1 [W2 …] --out report.html")
    out = absolute(cli.required(_OUT))
    logging.set_verbosity(logging.ERROR)  # Orbax tells of every array that it reads
    start.use_all_cores(None)
    runs, unreadable = collect(find_workdirs(argv[1:]))
    if not runs:
        raise errors.StorageFault("no run can be read:\n  - " + "\n  - ".join(unreadable))
    page = _Page(group(runs), absolute(_FIGURES.value) if _FIGURES.value else None)
    viewer = None if _QUICK.value else Viewer(_DATA_DIR.value, _MAX_IMAGES.value)
    sections = [*page.of_records(), *page.of_pictures(), *page.of_models(viewer), *page.of_files(viewer is not None)]
    title = f"Report on {runs[0].label}" if len(runs) == 1 else f"Report on {len(runs)} runs"
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(out, document(title, page.head(unreadable), sections, _made()))
    print(f"{len(runs)} runs in {out} ({out.stat().length / 2**20:.1f} MiB)")
    return errors.EXIT_DONE


class _Page:
    """The parts of the page, in order; what it draws is also written to `figures`, if that is given."""

    def __init__(self, groups: Sequence[Group], figures: epath.Path | None):
        self.groups, self._figures = groups, figures
        self.runs = [run for one in groups for run in one.runs]
        self.styles = line_styles(groups)

    def head(self, unreadable: Sequence[str]) -> Content:
        """A sentence for each run, and what could not be read."""
        sentences = [
            tag("li", tag("strong", run.label), f": {tables.sentence(run)} (", tag("code", str(run.workdir)), ")")
            for run in self.runs
        ]
        faults = [warning(tag("strong", run.label), f": {fault}") for run in self.runs for fault in run.faults]
        lost = [warning(f"Left out, for its config.json cannot be read: {line}") for line in unreadable]
        return [_made(), tag("ul", sentences, class_="plain"), faults, lost]

    def figure(self, plot: Plot, note: str = "") -> Html:
        if self._figures is not None:
            write_files(plot, self._figures)
        return figure(plot, note)

    def of_records(self) -> list[tuple[str, str, Html]]:
        """Tables, curves of each task, accuracy against masking, time."""
        parts = [
            section(
                "results",
                "Results",
                tables.results(self.groups),
                tables.cost(self.groups),
                tables.environments(self.runs),
            )
        ]
        against = []
        for task in dict.fromkeys(one.task for one in self.groups):
            groups = [one for one in self.groups if one.task == task]
            parts += self._curves(task, groups)
            against += self._against_masking(groups)
        if against:
            note = "Points are means over seeds, bars sample standard deviations, small dots single seeds."
            parts.append(section("masking", "Accuracy against masking", tag("p", note, class_="soft"), plots(against)))
        bars = time_bars(self.runs)
        if bars is not None:
            parts.append(
                section("time", "Where the time went", legend(bars.legend), plots([self.figure(bars)], wide=True))
            )
        return parts

    def _curves(self, task: str, groups: Sequence[Group]) -> list[tuple[str, str, Html]]:
        others = [name for name in scalar_names(run for one in groups for run in one.runs) if name not in _CURVES]
        wanted = dict(_CURVES)
        for name in others:
            if name.startswith("val_"):
                final = f"test_{name.removeprefix('val_')}"
                title = tables.long_title_of(name) + (", ◆ test" if final in others else "")
                wanted[name] = title, {"percent": tables.is_share(name), "final": final}
        drawn = [
            curve(groups, self.styles, metric=name, title=title, **options)
            for name, (title, options) in (wanted | _RATES).items()
        ]
        found = [plot for plot in drawn if plot is not None]
        if not found:
            return []
        lines: dict[Line, None] = dict.fromkeys(line for plot in found for line in plot.legend)
        note = "Each seed is a line of its own. " if any(len(one.runs) > 1 for one in groups) else ""
        note += "What is measured on single batches is drawn pale, with its running mean."
        figures = plots([self.figure(plot) for plot in found])
        return [section(f"curves-{task}", f"Curves: {task}", tag("p", note, class_="soft"), legend([*lines]), figures)]

    def _against_masking(self, groups: Sequence[Group]) -> list[Html]:
        names = scalar_names(run for one in groups for run in one.runs)
        accuracies = [name for name in names if name.endswith("top1") and not name.startswith("train_")]
        if "test_top1" in accuracies and "val_top1" in accuracies:
            accuracies.remove("val_top1")
        return [
            self.figure(plot)
            for name in accuracies
            for plot in against_masking(groups, name, tables.long_title_of(name))
        ]

    def of_pictures(self) -> list[tuple[str, str, Html]]:
        """What pretrainings restored as they went on; further seeds folded."""
        parts = []
        for one in self.groups:
            for number, run in enumerate(one.runs):
                shown = _pictures(run)
                if not shown:
                    continue
                if number:
                    parts.append(tag("details", tag("summary", run.label), shown))
                else:
                    parts.append([tag("h3", run.label), shown])
        return [section("pictures", "Reconstructions over time", parts)] if parts else []

    def of_models(self, viewer: Viewer | None) -> list[tuple[str, str, Html]]:
        """Accuracy of classes from the records; predictions and features of one run of each group."""
        classes = pictures.per_class([one for one in self.groups if not one.kind.has_decoder], self.styles)
        parts: list[Content] = []
        if classes is not None:
            parts += [legend(classes.legend), plots([self.figure(classes)])]
        if viewer is None:
            note = "Predictions, confusion matrices and features are left out (--quick)."
            parts.append(tag("p", note, class_="soft"))
        else:
            parts += [self._model(one, viewer) for one in self.groups]
        return [section("models", "Models", parts)]

    def _model(self, one: Group, viewer: Viewer) -> Content:
        run = one.shown
        several = f" (of the {len(one.runs)} runs {one.label}, seed {run.config.seed})" if len(one.runs) > 1 else ""
        head = tag("h3", run.label, several)
        print(f"{run.label}: predictions and features", flush=True)
        try:
            seen = viewer.look(run)
        except errors.UserError as error:
            return [head, warning(f"No predictions and features of {run.label}: {error}")]
        name = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in run.label)
        drawn, faults = [], []
        if seen.predictions is not None:
            drawn += [pictures.predictions(seen, name), pictures.confusion(seen, name)]
        origin = run.origins[0].place if run.origins else None
        encoder = next((other for other in self.groups if origin in [run.workdir for run in other.runs]), None)
        note = f"From checkpoint {seen.origin}, on {seen.split}."
        if not one.kind.trains_encoder and encoder is not None:
            note += f" The features are those of {encoder.label}: a probe leaves the encoder as it is."
        else:
            try:
                drawn.append(pictures.embedding(*embed(seen), seen.class_names, name))
            except errors.DataFault as fault:
                faults.append(warning(f"No picture of the features of {run.label}: {fault}"))
        return [head, tag("p", note, class_="soft"), faults, plots([self.figure(plot) for plot in drawn])]

    def of_files(self, arrays: bool) -> list[tuple[str, str, Html]]:
        return [
            section("configs", "Configurations", tables.configs(self.runs)),
            section("checkpoints", "Checkpoints", tables.states(self.runs, arrays=arrays)),
        ]


def _pictures(run: Run) -> Html | None:
    """Some of a run's pictures with their steps; a file that is none is told."""
    shown = []
    for path in pictures.some_pictures(run.workdir):
        step = int(path.stem.removeprefix("step_"))
        epoch = f", epoch {step / run.steps_per_epoch:.3g}" if run.steps_per_epoch else ""
        caption = f"Update {step:,}{epoch}"
        try:
            uri = pictures.to_data_uri(path)
        except OSError as error:
            shown.append(warning(f"{path} cannot be read: {error}"))
            continue
        alt = f"{run.label}, update {step}: originals, masked, reconstructions, and these with the visible patches"
        shown.append(picture(uri, caption, alt))
    note = note_on_moments(run.config)
    about = tag("p", f"Drawn {note}.", class_="soft") if note else ""
    return tag("div", about, plots(shown, wide=True)) if shown else None


def _made() -> Html:
    """When and by which version this page was made."""
    now = datetime.now(tz=UTC)
    return tag("p", f"{now:%Y-%m-%d %H:%M} UTC, mae_dist {version('mae_dist')}{_commit()}.", class_="soft")


def _commit() -> str:
    """The commit of a checkout, '' for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return f", commit {done.stdout.strip()}"


if __name__ == "__main__":
    cli.run(report)
