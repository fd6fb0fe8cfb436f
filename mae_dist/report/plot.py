"""How a report's figures are drawn: by matplotlib at the width of a phone, as SVG inside the page or as files.

Colours are told apart by colour-blind people (Okabe and Ito's), and lines of different groups by their dashes as well.
In the page the text is text, in the page's font and colour, so that it is readable in dark mode and can be found.
"""

import dataclasses
import io
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
from etils import epath
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mae_dist.storage import storage_errors, write_bytes_atomically

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
MARKERS = "osD^vP*X"
_WIDTH = 4.2  # inches: a phone's width at the size of its text
_INK = "#020301"  # of all text and axes while drawing; replaced by the page's own
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a run's name may contain a $
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "grid.color": "#8A8F98",
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
}
_INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")

Line = tuple[str, str, Any]  # label, colour, dashes: an entry of a legend


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure that is not drawn yet.

    name: of its files. title: above it. of: the task or run it is about, which in a page the heading says.
    alt: what it shows, for those who do not see it. draw: into a matplotlib Figure. height: in inches.
    legend: what a file needs and a page has beside its figures. on_white: its colours need a light ground.
    """

    name: str
    title: str
    of: str
    alt: str
    draw: Callable[[Figure], None]
    height: float = 2.6
    legend: tuple[Line, ...] = ()
    on_white: bool = False


def shorten(text: str, length: int) -> str:
    """At most so many characters, the middle left out: names differ at their ends."""
    if len(text) <= length:
        return text
    half = (length - 1) // 2
    return f"{text[: length - 1 - half]}…{text[len(text) - half :]}"


def duration(secs: float) -> str:
    """52 s, 12 min, 3.4 h, 2.1 days."""
    for unit, size, below in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 48)):
        if secs / size < below:
            return f"{secs / size:.{1 if unit == 'h' else 0}f} {unit}"
    return f"{secs / 86400:.1f} days"


def to_svg(plot: Plot) -> str:
    """An `<svg>` element for a page: no prolog, no metadata, no address of anything, names of its own."""
    data = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with _style(plot, _INK):
        figure = _drawn(plot)
        figure.savefig(data, format="svg", transparent=True, metadata=nothing, dpi=170)
    text = data.getvalue()
    text = re.sub(
        r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", text[text.index("<svg") :], count=1, flags=re.DOTALL
    )
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href").replace(_INK, "currentColor")
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    names = set(re.findall(r' id="([^"]+)"', text))
    # Elements of all figures are in one document: only what is referred to keeps its name, behind the figure's.
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    for name in names - used:
        text = text.replace(f' id="{name}"', "")
    text = re.sub(r'(url\(#|href="#| id=")([^")]+)', rf"\g<1>{plot.name}-\g<2>", text)
    return re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)


def write_files(plot: Plot, directory: epath.Path) -> None:
    """`<name>.png` and `<name>.svg` with title and legend, for papers and slides."""
    with _style(plot, "#222222"):
        figure = _drawn(plot)
        figure.suptitle(f"{plot.title}\n{shorten(plot.of, 44)}".strip(), fontsize=10)
        if len(plot.legend) > 1:
            handles = [
                Line2D([], [], color=color, linestyle=dashes, label=shorten(label, 40))
                for label, color, dashes in plot.legend
            ]
            columns = 1 if max(len(label) for label, *_ in plot.legend) > 22 else 2
            rows = -(-len(handles) // columns)
            figure.set_figheight(plot.height + 0.3 + 0.2 * rows)
            figure.legend(handles=handles, loc="outside lower center", ncols=columns)
        for kind in ("png", "svg"):
            data = io.BytesIO()
            metadata = {"Date": None} if kind == "svg" else None  # the same runs make the same files
            figure.savefig(data, format=kind, facecolor="white", metadata=metadata, dpi=200)
            figure.set_layout_engine("none")  # found already
            path = directory / f"{plot.name}.{kind}"
            with storage_errors(path):
                directory.mkdir(parents=True, exist_ok=True)
                write_bytes_atomically(path, data.getvalue())


def _style(plot: Plot, ink: str) -> AbstractContextManager[None]:
    values: dict[Any, Any] = {**_STYLE, **dict.fromkeys(_INKED, ink), "svg.hashsalt": plot.name}
    return matplotlib.rc_context(values)


def _drawn(plot: Plot) -> Figure:
    figure = Figure(figsize=(_WIDTH, plot.height), layout="constrained")
    FigureCanvasAgg(figure)
    plot.draw(figure)
    return figure
