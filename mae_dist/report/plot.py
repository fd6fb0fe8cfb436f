"""Drawing of a report's figures by matplotlib, at the width of a phone: as SVG inside the page, or as files.

Colour-blind people can distinguish the colours (Okabe and Ito's); groups of runs also differ by their dashes. In the
page the text is text, in the page's font and colour, so that it is readable in dark mode and can be found.
"""

import dataclasses
import io
import re
from typing import Any

from etils import epath
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mae_dist.storage import storage_errors, write_bytes_atomically

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
MARKERS = "osD^vP*X"
_WIDTH = 4.2  # inches: a phone's width at the size of its text
_INK = "#020301"  # of all text and axes; in the page replaced by the page's own
STYLE: dict[Any, Any] = {  # in which figures are drawn and saved
    "svg.hashsalt": "mae_dist",  # the same runs make the same files
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
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}

Line = tuple[str, str, Any]  # label, colour, dashes: an entry of a legend


@dataclasses.dataclass(frozen=True)
class Plot:
    """Drawn figure.

    name: of its files, and before the ids in its SVG. title: above it.
    of: the task or run it is about, which in a page the heading says.
    alt: what it shows, for those who do not see it. figure: without title and legend.
    legend: what a file needs and a page has beside its figures. on_white: its colours need a light background.
    """

    name: str
    title: str
    of: str
    alt: str
    figure: Figure
    legend: tuple[Line, ...] = ()
    on_white: bool = False

    @property
    def file_name(self) -> str:
        """Returns the name without characters that mean something in a path or in markup."""
        return re.sub(r"[^\w.-]", "_", self.name)

    def markup(self) -> Markup:
        """Returns an `<svg>` element for a page: without prolog, metadata, addresses and rules for the whole page."""
        data = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        self.figure.savefig(data, format="svg", transparent=True, metadata=nothing, dpi=170)
        svg = data.getvalue().partition("<svg")[2]
        for pattern, replacement in (
            (r"<defs>\s*<style.*?</style>\s*</defs>", ""),
            (r"<!--.*?-->\s*", ""),
            (r' xmlns(:\w+)?="[^"]*"', ""),
            (r' (width|height)="[\d.]+pt"', ""),
            (r"xlink:href", "href"),
            (_INK, "currentColor"),
            (r'(url\(#|href="#| id=")', rf"\g<1>{self.file_name}-"),  # all figures are in one document
        ):
            svg = re.sub(pattern, replacement, svg, flags=re.DOTALL)
        kind = "plot white" if self.on_white else "plot"
        return Markup('<svg class="{}" role="img" aria-label="{}"{}').format(kind, self.alt, Markup(svg))


def shorten(text: str, length: int) -> str:
    """Shortens text to `length` characters by leaving out its middle: names differ at their ends."""
    if len(text) <= length:
        return text
    half = (length - 1) // 2
    return f"{text[: length - 1 - half]}…{text[len(text) - half :]}"


def duration(secs: float) -> str:
    """Returns 52 s, 12 min, 3.4 h or 2.1 days."""
    if secs < 100:
        return f"{secs:.0f} s"
    if secs < 6000:
        return f"{secs / 60:.0f} min"
    return f"{secs / 3600:.1f} h" if secs < 48 * 3600 else f"{secs / 86400:.1f} days"


def new_figure(height: float = 2.6) -> Figure:
    """Returns an empty figure, as wide as a phone; `height` in inches."""
    return Figure(figsize=(_WIDTH, height), layout="constrained")


def write_files(plot: Plot, directory: epath.Path) -> None:
    """Writes `<name>.png` and `<name>.svg` for papers and slides; the figure then has its title and legend."""
    figure = plot.figure
    figure.suptitle(f"{plot.title}\n{shorten(plot.of, 44)}".strip(), fontsize=10)
    if len(plot.legend) > 1:
        handles = [
            Line2D([], [], color=color, linestyle=dashes, label=shorten(label, 40))
            for label, color, dashes in plot.legend
        ]
        columns = 1 if max(len(label) for label, *_ in plot.legend) > 22 else 2
        figure.set_figheight(figure.get_figheight() + 0.3 + 0.2 * -(-len(handles) // columns))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    for kind in ("png", "svg"):
        data = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(data, format=kind, facecolor="white", metadata=metadata, dpi=200)
        figure.set_layout_engine("none")  # found already
        path = directory / f"{plot.file_name}.{kind}"
        with storage_errors(path):
            directory.mkdir(parents=True, exist_ok=True)
            write_bytes_atomically(path, data.getvalue())
