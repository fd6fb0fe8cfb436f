"""A report's figures of what runs recorded: curves, where the time went, accuracy against masking."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mae_dist.report.groups import Group, family_names, mean_std
from mae_dist.report.plot import COLORS, DASHES, MARKERS, Line, Plot, duration, shorten
from mae_dist.report.runs import Run

# Parts of a run's time: label, colour, and the phases of the ledger that belong to it.
TIME = (
    ("updates that counted", "#0072B2", ("step",)),
    ("updates done again", "#D55E00", ("replayed",)),
    ("evaluation", "#56B4E9", ("evaluate",)),
    ("checkpoints", "#E69F00", ("checkpoint",)),
    ("waiting for data", "#CC79A7", ("data",)),
    ("start and compilation", "#009E73", ("start", "join", "restore", "compile")),
    ("away", "#8A8F98", ("away",)),
)
_OTHER = ("other", "#5B4B8A")


def line_styles(groups: Sequence[Group]) -> dict[str, Line]:
    """A colour and dashes for each group, the same in all figures."""
    styles = itertools.product(DASHES, COLORS)
    return {one.label: (one.label, color, dashes) for one, (dashes, color) in zip(groups, itertools.cycle(styles))}


def curve(
    groups: Sequence[Group],
    styles: Mapping[str, Line],
    *,
    metric: str,
    title: str,
    percent: bool = False,
    log: bool = False,
    smooth: bool = False,
    final: str = "",
) -> Plot | None:
    """One metric of all runs over epochs, or over updates if a run does not know its epochs; None if nobody has it.

    Args:
      groups: of one task.
      styles: `line_styles`.
      metric: its name in the records; `final` that of a value of the end, drawn as a diamond.
      title: of the figure.
      percent: values are shares.
      log: a logarithmic scale, if values span enough of it.
      smooth: single batches are noisy: a running mean, and the values themselves pale.
    """
    having = [(one, run) for one in groups for run in one.runs if run.series(metric)[0] or (final and run.last(final))]
    if not having:
        return None
    by_epoch = all(run.steps_per_epoch for _, run in having)
    factor = 100 if percent else 1

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        lowest, highest = np.inf, -np.inf
        for one, run in having:
            _, color, dashes = styles[one.label]
            scale = run.steps_per_epoch if by_epoch and run.steps_per_epoch else 1
            steps, values = (np.asarray(column) for column in run.series(metric))
            x, y = steps / scale, values * factor
            if smooth and len(y) > 20:
                axes.plot(x, y, color=color, alpha=0.25, linewidth=0.7)
                x, y = _running_mean(x, y, max(3, len(y) // 40))
            few = len(y) <= 30
            axes.plot(
                x, y, color=color, linestyle=dashes, marker="o" if few else "", markersize=3, alpha=1 if few else 0.9
            )
            at_end, end = run.series(final) if final else ([], [])
            axes.plot(
                np.asarray(at_end[-1:]) / scale,
                np.asarray(end[-1:]) * factor,
                "D",
                color=color,
                markersize=6.5,
                markeredgecolor="white",
                markeredgewidth=0.8,
                clip_on=False,
                zorder=3,
            )
            seen = [*y, *(value * factor for value in end[-1:])]
            lowest, highest = min([lowest, *seen]), max([highest, *seen])
        if log and lowest > 0 and highest / lowest > 4:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        else:
            axes.yaxis.set_major_locator(MaxNLocator(6))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axes.set_xlim(left=0)
        axes.set_xlabel("epoch" if by_epoch else "update")
        if percent:
            axes.set_ylabel("%")

    told = []
    for one in groups:
        values = one.values(metric)
        if values:
            mean, std = mean_std([value * factor for value in values])
            told.append(f"{one.label} ends at {mean:.4g}{'' if std is None else f' ± {std:.2g}'}")
    task = groups[0].task
    legend = tuple({one.label: styles[one.label] for one, _ in having}.values())
    return Plot(f"{task}_{metric}", title, task, f"{title}: {'; '.join(told)}", draw, legend=legend)


def _running_mean(x: np.ndarray, y: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of `window` neighbours, at their middle."""
    kernel = np.ones(window) / window
    return np.convolve(x, kernel, "valid"), np.convolve(y, kernel, "valid")


def time_parts(run: Run) -> list[tuple[str, str, float]]:
    """(label, colour, seconds) of the parts of a run's time."""
    secs = dict(run.ledger.get("secs", {}))
    parts = [(label, color, sum(secs.pop(phase, 0.0) for phase in phases)) for label, color, phases in TIME]
    return [*parts, (*_OTHER, sum(secs.values()))]


def time_bars(runs: Sequence[Run]) -> Plot | None:
    """Where the time of each run went, a bar of 100 % each; None without a ledger."""
    runs = [run for run in runs if sum(secs for *_, secs in time_parts(run)) > 0]
    if not runs:
        return None
    used = {(label, color) for run in runs for label, color, secs in time_parts(run) if secs > 0}
    legend = tuple((label, color, "-") for label, color, *_ in [*TIME, _OTHER] if (label, color) in used)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for row, run in enumerate(runs):
            parts = time_parts(run)
            total, left = sum(secs for *_, secs in parts), 0.0
            for _, color, secs in parts:
                axes.barh(row, 100 * secs / total, left=left, height=0.42, color=color, linewidth=0)
                left += 100 * secs / total
            text = f"{shorten(run.label, 34)}: {parts[0][2] / total:.0%} of {duration(total)}"
            axes.text(0, row - 0.32, text, fontsize=9, va="bottom")
        axes.set(xlim=(0, 100), ylim=(len(runs) - 0.6, -0.85), yticks=[], xlabel="% of the time since the first start")
        axes.spines["left"].set_visible(False)
        axes.grid(axis="y", visible=False)

    told = "; ".join(
        f"{run.label}: " + ", ".join(f"{label} {duration(secs)}" for label, _, secs in time_parts(run) if secs > 0)
        for run in runs
    )
    return Plot("time", "Shares of each run's time", "", told, draw, height=0.75 + 0.45 * len(runs), legend=legend)


def against_masking(groups: Sequence[Group], metric: str, title: str) -> list[Plot]:
    """Accuracy against the masking ratio, and against the strategy, where groups differ in that and nothing else."""
    having = [(one, one.shown.masking) for one in groups if one.values(metric)]
    names = family_names(one for one, masking in having if masking is not None)
    points: dict[tuple[str, str, float], list[float]] = {}  # by experiment, strategy and ratio
    for one, masking in having:
        if masking is not None:
            name = f"{names[one.family]}, " if names[one.family] else ""
            points[name, f"{masking.strategy} {masking.file}".strip(), masking.ratio] = one.values(metric)
    strategies = sorted({strategy for _, strategy, _ in points})
    by_ratio: dict[str, list[tuple[float, Sequence[float]]]] = {}
    by_strategy: dict[str, list[tuple[float, Sequence[float]]]] = {}
    for (name, strategy, ratio), values in sorted(points.items()):
        if strategy.partition(" ")[0] != "user":  # of a user's mask its file decides the ratio
            by_ratio.setdefault(f"{name}{strategy}", []).append((ratio, values))
        by_strategy.setdefault(f"{name}ratio {ratio:g}", []).append((strategies.index(strategy), values))
    told = "; ".join(
        f"{name}{strategy} {ratio:g}: {_told([100 * value for value in values])}"
        for (name, strategy, ratio), values in sorted(points.items())
    )
    plots = []
    for what, series, ticks in (("ratio", by_ratio, None), ("strategy", by_strategy, strategies)):
        if any(len(values) > 1 for values in series.values()):
            task = groups[0].task
            name = f"{task}_{metric}_against_{what}"
            plots.append(_error_bars(name, title, task, told, series, f"masking {what}", ticks))
    return plots


def _told(values: Sequence[float]) -> str:
    mean, std = mean_std(values)
    return f"{mean:.2f} %" if std is None else f"{mean:.2f} ± {std:.2f} % (n = {len(values)})"


def _error_bars(
    name: str,
    title: str,
    task: str,
    told: str,
    series: Mapping[str, Sequence[tuple[float, Sequence[float]]]],
    label: str,
    ticks: Sequence[str] | None,
) -> Plot:
    """Means with sample standard deviations, the single values beside them; `ticks` name the places 0, 1, …"""
    styles = [(key, COLORS[i % len(COLORS)], DASHES[i % len(DASHES)]) for i, key in enumerate(series)]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, ((_, values), (key, color, dashes)) in enumerate(zip(series.items(), styles, strict=True)):
            aside = 0.08 * (number - (len(series) - 1) / 2) if ticks else 0.0  # else they would cover each other
            x = [place + aside for place, _ in values]
            means, stds = zip(*(mean_std([100 * value for value in found]) for _, found in values), strict=True)
            axes.errorbar(
                x,
                means,
                yerr=[std or 0 for std in stds],
                color=color,
                linestyle="none" if ticks else dashes,
                marker=MARKERS[number % len(MARKERS)],
                markersize=5.5,
                capsize=3.5,
                label=shorten(key, 50),
            )
            for place, (_, found) in zip(x, values, strict=True):
                axes.plot(
                    [place] * len(found), [100 * value for value in found], ".", color=color, markersize=7, alpha=0.5
                )
        axes.set(xlabel=label, ylabel="%")
        axes.margins(x=0.08, y=0.12)
        if ticks:
            axes.set_xticks(range(len(ticks)), [shorten(tick, 36 // len(ticks)) for tick in ticks])
            axes.set_xlim(-0.5, len(ticks) - 0.5)
        else:
            axes.set_xticks(sorted({place for values in series.values() for place, _ in values}))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if len(series) > 1:  # below, where it covers nothing, in a column that the width has room for
            figure.legend(loc="outside lower center", ncols=1)

    height = 2.6 + (0.2 * len(series) if len(series) > 1 else 0)
    return Plot(name, f"{title} against the {label}", task, f"{title} against the {label}: {told}", draw, height=height)
