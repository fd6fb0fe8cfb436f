"""Writes one HTML page about runs: `python -m mae_dist.report W1 [W2 …] --out report.html [--figures DIR]`.

W is the workdir of a run, finished or not, or a directory of such. The page has results, means over seeds, curves,
where the time went, pictures, and predictions and features of every model's newest good checkpoint. It loads nothing
from anywhere and has no script.

`--update PAGE.md` instead makes the tables of results in a Markdown document anew, of the runs that it names: see
`report/document.py`. `--keep DIR` instead writes what such tables need of each run into a directory that can be
committed: its config, summary and evaluations.
"""

import logging
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

import matplotlib
from absl import flags
from etils import epath

from mae_dist import cli, console, errors, readable, revision
from mae_dist.cpu import start
from mae_dist.evaluation.pictures import note_on_moments
from mae_dist.report import document, pictures, records, tables
from mae_dist.report.figures import against_masking, curves, time_bars
from mae_dist.report.groups import Group, group, scalar_names
from mae_dist.report.model import Viewer, embed
from mae_dist.report.page import Part, Picture, Section, render, strong
from mae_dist.report.plot import STYLE, Plot, write_files
from mae_dist.report.runs import Run, collect, find_workdirs
from mae_dist.storage import absolute, storage_errors, write_text_atomically

_OUT = flags.DEFINE_string("out", None, "The HTML file to write.", allow_override=True)
_FIGURES = flags.DEFINE_string("figures", "", "Also write each figure as PNG and SVG into this directory.")
_QUICK = flags.DEFINE_bool("quick", False, "Leave out what needs models or data.")
_DATA_DIR = flags.DEFINE_string(
    "data_dir", "", "Where TFDS keeps data sets, if not where the runs had it.", allow_override=True
)
_UPDATE = flags.DEFINE_string("update", "", "A Markdown document whose tables of results to make anew.")
_KEEP = flags.DEFINE_string("keep", "", "A directory for what tables of results need of each finished run.")
_MAX_IMAGES = flags.DEFINE_integer("max_images", 10_000, "The most of a split that a model sees.", lower_bound=1)


@matplotlib.rc_context(STYLE)
def report(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    if _UPDATE.value:
        return _update(absolute(_UPDATE.value))
    if len(argv) < 2:
        raise errors.ConfigError("which runs? Give workdirs: python -m mae_dist.report W1 [W2 …] --out report.html")
    if _KEEP.value:
        return _keep(find_workdirs(argv[1:]), absolute(_KEEP.value))
    out = absolute(cli.required(_OUT))
    console.set_level(logging.ERROR)  # the page names what is amiss with a run
    start.use_all_cores(None)
    runs, unreadable = collect(find_workdirs(argv[1:]))
    if not runs:
        raise errors.StorageFault("no run can be read:\n  - " + "\n  - ".join(unreadable))
    groups = group(runs)
    runs = [run for one in groups for run in one.runs]
    sections = _sections(groups, runs, None if _QUICK.value else Viewer(_DATA_DIR.value, _MAX_IMAGES.value))
    page = render(
        title=f"Report on {runs[0].label}" if len(runs) == 1 else f"Report on {len(runs)} runs",
        made=f"{datetime.now(tz=UTC):%Y-%m-%d %H:%M} UTC, mae_dist {revision.described()}.",
        runs=[(run.label, tables.sentence(run), run.workdir) for run in runs],
        warnings=[
            *(strong(run.label) + f": {fault}" for run in runs for fault in run.faults),
            *(f"Left out, because its config.json cannot be read: {line}" for line in unreadable),
        ],
        sections=sections,
    )
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(out, page)
    if _FIGURES.value:
        for figure in (figure for section in sections for part in section.parts for figure in part.figures):
            if isinstance(figure, Plot):
                write_files(figure, absolute(_FIGURES.value))
    print(f"{len(runs)} runs in {readable.path(out)} ({out.stat().length / 2**20:.1f} MiB)")
    return errors.EXIT_DONE


def _update(path: epath.Path) -> int:
    with storage_errors(path):
        text = path.read_text()
    new = document.update(text, path.parent)
    with storage_errors(path):
        write_text_atomically(path, new)
    print(f"{readable.path(path)} {'is as it was' if new == text else 'has new tables'}")
    return errors.EXIT_DONE


def _keep(workdirs: Sequence[epath.Path], out: epath.Path) -> int:
    runs, unreadable = collect(workdirs)
    kept = records.keep(runs, out)
    left_out = [f"{run.workdir}: not finished" for run in runs if not run.finished] + unreadable
    print(f"{len(kept)} runs kept in {readable.path(out)}" + "".join(f"\n  left out: {line}" for line in left_out))
    return errors.EXIT_DONE


def _sections(groups: Sequence[Group], runs: Sequence[Run], viewer: Viewer | None) -> list[Section]:
    """Returns the page's sections, in order, without empty ones."""
    tasks: dict[str, list[Group]] = {}
    for one in groups:
        tasks.setdefault(one.task, []).append(one)
    results = [tables.results(task, same) for task, same in tasks.items()]
    sections = [
        Section(
            "results",
            "Results",
            [Part(tables=[*results, tables.cost(groups)]), tables.environments(runs)],
        ),
        *(Section(f"curves-{task}", f"Curves: {task}", _curves(same)) for task, same in tasks.items()),
        Section("masking", "Accuracy against masking", _masking(tasks.values())),
        Section("time", "Where the time went", _figures([time_bars(runs)], wide=True)),
        Section("pictures", "Reconstructions over time", _reconstructions(groups)),
        Section("models", "Models", _models(groups, viewer)),
        Section("configs", "Configurations", tables.configs(runs)),
        Section("checkpoints", "Checkpoints", [tables.states(runs, arrays=viewer is not None)]),
    ]
    return [section for section in sections if section.parts]


def _figures(plots: Iterable[Plot | None], note: str = "", *, wide: bool = False) -> list[Part]:
    """Returns one part with these figures below their legend; none without figures."""
    found = [plot for plot in plots if plot is not None]
    legend = dict.fromkeys(line for plot in found for line in plot.legend)
    return [Part(note=note, legend=[*legend], figures=found, wide=wide)] if found else []


def _curves(groups: Sequence[Group]) -> list[Part]:
    note = "Each seed is a line of its own. " if any(len(one.runs) > 1 for one in groups) else ""
    note += "What is measured on single batches is drawn pale, with its running mean."
    return _figures(curves(groups), note)


def _masking(tasks: Iterable[Sequence[Group]]) -> list[Part]:
    plots = []
    for groups in tasks:
        accuracies = [name for name in scalar_names(groups) if name.endswith("top1") and not name.startswith("train_")]
        if "test_top1" in accuracies and "val_top1" in accuracies:
            accuracies.remove("val_top1")
        plots += [plot for name in accuracies for plot in against_masking(groups, name)]
    note = "Points are means over seeds, bars sample standard deviations, small dots single seeds."
    return _figures(plots, note)


def _reconstructions(groups: Sequence[Group]) -> list[Part]:
    """Returns the pictures that each pretraining drew; those of further seeds are folded."""
    parts = []
    for run, folded in ((run, number > 0) for one in groups for number, run in enumerate(one.runs)):
        shown, warnings = [], []
        for path in pictures.some_pictures(run.workdir):
            step = int(path.stem.removeprefix("step_"))
            epoch = f", epoch {step / run.steps_per_epoch:.3g}" if run.steps_per_epoch else ""
            alt = f"{run.label}, step {step}: originals, masked, reconstructions, and these with the visible patches"
            try:
                shown.append(Picture(f"Step {step:,}{epoch}", alt, pictures.to_data_uri(path)))
            except OSError as error:
                warnings.append(f"{path} cannot be read: {error}")
        if shown or warnings:
            about = note_on_moments(run.config)
            note = f"Drawn {about}." if about else ""
            parts.append(Part(run.label, note, warnings, figures=shown, folded=folded, wide=True))
    return parts


def _models(groups: Sequence[Group], viewer: Viewer | None) -> list[Part]:
    """Returns accuracies of classes from the records, and predictions and features of one run of each group."""
    parts = _figures([pictures.per_class([one for one in groups if not one.kind.has_decoder])])
    if viewer is None:
        return [*parts, Part(note="Predictions, confusion matrices and features are left out (--quick).")]
    return [*parts, *(_model(one, groups, viewer) for one in groups)]


def _model(one: Group, groups: Sequence[Group], viewer: Viewer) -> Part:
    run = one.shown
    several = f" (of the {len(one.runs)} runs {one.label}, seed {run.config.seed})" if len(one.runs) > 1 else ""
    heading = f"{run.label}{several}"
    print(f"{run.label}: predictions and features", flush=True)
    try:
        seen = viewer.look(run)
    except errors.UserError as error:
        return Part(heading, warnings=[f"No predictions and features of {run.label}: {error}"])
    plots, warnings = [], []
    if seen.predictions is not None:
        plots += [pictures.predictions(seen, run.label), pictures.confusion(seen, run.label)]
    note = f"From checkpoint {seen.origin}, on {seen.split}."
    origin = run.origins[0].place if run.origins else None
    encoder = next((other for other in groups if origin in [run.workdir for run in other.runs]), None)
    if not one.kind.trains_encoder and encoder is not None:
        note += f" The features are those of {encoder.label}: a probe leaves the encoder as it is."
    else:
        plots.append(pictures.colours(seen, run.label))
        try:
            plots.append(pictures.embedding(*embed(seen), seen.class_names, run.label))
        except errors.DataFault as fault:
            warnings.append(f"No picture of the features of {run.label}: {fault}")
    return Part(heading, note, warnings, figures=plots)


if __name__ == "__main__":
    cli.run(report)
