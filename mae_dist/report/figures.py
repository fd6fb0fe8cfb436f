"""Figures of what runs recorded: curves, where the time went, accuracy against masking."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from mae_dist.metrics.results import spread
from mae_dist.report.groups import Group, family_names, scalar_names
from mae_dist.report.plot import COLORS, DASHES, MARKERS, Plot, duration, new_figure, shorten
from mae_dist.report.runs import Run
from mae_dist.report.tables import is_fraction, long_title_of, percent

# Parts of a run's time: label, colour, and the phases of the ledger that belong to it.
_TIME = (
    ("steps that counted", "#0072B2", ("step",)),
    ("steps done again", "#D55E00", ("replayed",)),
    ("evaluation", "#56B4E9", ("evaluate",)),
    ("checkpoints", "#E69F00", ("checkpoint",)),
    ("waiting for data", "#CC79A7", ("data",)),
    ("start and compilation", "#009E73", ("start", "join", "restore", "compile")),
    ("away", "#8A8F98", ("away",)),
)
_OTHER = ("other", "#5B4B8A")
_NOISY = ("loss", "top1")  # measured on single batches
_LOG_SCALED = ("loss", "val_loss")
_TITLES = {"lr": "Learning rate", "images_per_sec": "Images per second"}


def curves(groups: Sequence[Group]) -> list[Plot | None]:
    """Returns a figure of each metric that the runs of one task have recorded."""
    known = ("loss", "val_loss", "top1", "val_top1")
    others = [name for name in scalar_names(groups) if name.startswith("val_") and name not in known]
    return [_curve(groups, metric) for metric in (*known, *others, "lr", "images_per_sec")]


def _curve(groups: Sequence[Group], metric: str) -> Plot | None:
    """Returns one metric of all runs over epochs, or over steps if a run does not know its epochs; None if none has it.

    A validation metric ends in a diamond, the value of the test split. Single batches are drawn pale, with their
    running mean.
    """
    final = metric.replace("val_", "test_", 1) if metric.startswith("val_") else ""
    having = [(one, run) for one in groups for run in one.runs if run.series(metric)[0] or run.series(final)[0]]
    if not having:
        return None
    by_epoch = all(run.steps_per_epoch for _, run in having)
    factor = 100 if is_fraction(metric) else 1

    figure = new_figure()
    axes = figure.subplots()
    for one, run in having:
        _, color, dashes = one.line
        scale = run.steps_per_epoch if by_epoch and run.steps_per_epoch else 1
        x, y = (np.asarray(column) for column in run.series(metric))
        x, y = x / scale, y * factor
        if metric in _NOISY and len(y) > 20:
            axes.plot(x, y, color=color, alpha=0.25, linewidth=0.7)
            window = np.ones(max(3, len(y) // 40))
            x, y = (np.convolve(column, window / len(window), "valid") for column in (x, y))
        marker = "o" if len(y) <= 30 else ""
        axes.plot(x, y, color=color, linestyle=dashes, marker=marker, markersize=3)
        steps, values = run.series(final)
        if values:
            diamond = {"markersize": 6.5, "markeredgecolor": "white", "markeredgewidth": 0.8}
            axes.plot(steps[-1] / scale, values[-1] * factor, "D", color=color, clip_on=False, zorder=3, **diamond)
    lowest, highest = axes.dataLim.intervaly
    if metric in _LOG_SCALED and lowest > 0 and highest / lowest > 4:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter("{x:,.10g}")
    axes.yaxis.set_major_formatter("{x:,.10g}")
    axes.set_xlim(left=0)
    axes.set(xlabel="epoch" if by_epoch else "step", ylabel="%" if is_fraction(metric) else "")

    ends = []
    for one in groups:
        if values := one.values(metric):
            found = spread([value * factor for value in values])
            ends.append(f"{one.label} ends at {found.mean:.4g}{f' ± {found.std:.2g}' if found.count > 1 else ''}")
    title = _TITLES.get(metric) or long_title_of(metric)
    if any(run.series(final)[0] for _, run in having):
        title += ", ◆ test"
    task = groups[0].task
    legend = tuple(dict.fromkeys(one.line for one, _ in having))
    return Plot(f"{task}_{metric}", title, task, f"{title}: {'; '.join(ends)}", figure, legend)


def _time_parts(run: Run) -> list[tuple[str, str, float]]:
    """Returns (label, colour, seconds) of the parts of a run's time."""
    secs = dict(run.ledger.get("secs", {}))
    parts = [(label, color, sum(secs.pop(phase, 0.0) for phase in phases)) for label, color, phases in _TIME]
    return [*parts, (*_OTHER, sum(secs.values()))]


def time_bars(runs: Sequence[Run]) -> Plot | None:
    """Returns where the time of each run went, a bar of 100 % each; None without a ledger."""
    timed = [(run, _time_parts(run)) for run in runs if any(run.ledger.get("secs", {}).values())]
    if not timed:
        return None
    used = {label for _, parts in timed for label, _, secs in parts if secs > 0}
    legend = tuple((label, color, "-") for label, color, *_ in [*_TIME, _OTHER] if label in used)

    figure = new_figure(0.75 + 0.45 * len(timed))
    axes = figure.subplots()
    for row, (run, parts) in enumerate(timed):
        total, left = sum(secs for *_, secs in parts), 0.0
        for _, color, secs in parts:
            axes.barh(row, 100 * secs / total, left=left, height=0.42, color=color, linewidth=0)
            left += 100 * secs / total
        text = f"{shorten(run.label, 34)}: {parts[0][2] / total:.0%} of {duration(total)}"
        axes.text(0, row - 0.32, text, fontsize=9, va="bottom")
    axes.set(xlim=(0, 100), ylim=(len(timed) - 0.6, -0.85), yticks=[], xlabel="% of the time since the first start")
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)

    alt = "; ".join(
        f"{run.label}: " + ", ".join(f"{label} {duration(secs)}" for label, _, secs in parts if secs > 0)
        for run, parts in timed
    )
    return Plot("time", "Fractions of each run's time", "", alt, figure, legend)


Series = Mapping[str, Sequence[tuple[float, Sequence[float]]]]  # label -> points: place, value of each seed


def against_masking(groups: Sequence[Group], metric: str) -> list[Plot]:
    """Returns accuracy against the masking ratio, and the strategy, where groups differ in that and nothing else."""
    having = [one for one in groups if one.shown.masking is not None and one.values(metric)]
    names = family_names(having)
    points: dict[tuple[str, str, float], list[float]] = {}  # (experiment, strategy, ratio) -> the value of each seed
    for one in having:
        masking = one.shown.masking
        assert masking is not None
        name = f"{names[one.family]}, " if names[one.family] else ""
        squares = f"{masking.block}x{masking.block}" if masking.block > 1 else ""
        drawn = " ".join(part for part in (masking.strategy, squares, masking.file) if part)
        points[name, drawn, masking.ratio] = one.values(metric)
    points = dict(sorted(points.items()))
    strategies = sorted({strategy for _, strategy, _ in points})
    by_ratio, by_strategy, ends = {}, {}, []
    for (name, strategy, ratio), values in points.items():
        if strategy.partition(" ")[0] != "user":  # the ratio of a user's mask follows from its file
            by_ratio.setdefault(f"{name}{strategy}", []).append((ratio, values))
        by_strategy.setdefault(f"{name}ratio {ratio:g}", []).append((strategies.index(strategy), values))
        count = f" (n = {len(values)})" if len(values) > 1 else ""
        ends.append(f"{name}{strategy} {ratio:g}: {percent(values)}{count}")
    plots = []
    for what, series, ticks in (("ratio", by_ratio, ()), ("strategy", by_strategy, strategies)):
        if any(len(values) > 1 for values in series.values()):
            title = f"{long_title_of(metric)} against the masking {what}"
            task, figure = groups[0].task, _error_bars(series, f"masking {what}", ticks)
            alt = f"{title}: {'; '.join(ends)}"
            plots.append(Plot(f"{task}_{metric}_against_{what}", title, task, alt, figure))
    return plots


def _error_bars(series: Series, label: str, ticks: Sequence[str]) -> Figure:
    """Returns means with sample standard deviations, the single values beside them; `ticks` name the places 0, 1, …"""
    figure = new_figure(2.6 + (0.2 * len(series) if len(series) > 1 else 0))
    axes = figure.subplots()
    for number, (key, points) in enumerate(series.items()):
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        dashes = "none" if ticks else DASHES[number % len(DASHES)]
        aside = 0.08 * (number - (len(series) - 1) / 2) if ticks else 0.0  # else they would cover each other
        x = [place + aside for place, _ in points]
        spreads = [spread([100 * value for value in values]) for _, values in points]
        axes.errorbar(
            x,
            [found.mean for found in spreads],
            yerr=[found.std if found.count > 1 else 0 for found in spreads],
            color=color,
            linestyle=dashes,
            marker=marker,
            markersize=5.5,
            capsize=3.5,
            label=shorten(key, 50),
        )
        for place, (_, values) in zip(x, points, strict=True):
            axes.plot([place] * len(values), np.multiply(values, 100), ".", color=color, markersize=7, alpha=0.5)
    axes.set(xlabel=label, ylabel="%")
    axes.margins(x=0.08, y=0.12)
    if ticks:
        axes.set_xticks(range(len(ticks)), [shorten(tick, 36 // len(ticks)) for tick in ticks])
        axes.set_xlim(-0.5, len(ticks) - 0.5)
    else:
        axes.set_xticks(sorted({place for points in series.values() for place, _ in points}))
        axes.xaxis.set_major_formatter("{x:g}")
    if len(series) > 1:  # below, where it covers nothing, in a column that the width has room for
        figure.legend(loc="outside lower center", ncols=1)
    return figure
