"""Parts of a report, and their rendering as one self-contained HTML page.

Jinja2 escapes all text but `Markup`. Nothing in the page is loaded from anywhere, and its content security policy says
so to the browser; there is no script.
"""

import dataclasses
import re
from collections.abc import Sequence

import jinja2
from markupsafe import Markup, escape

from mae_dist.report.plot import Line, Plot

Row = tuple[str, str, Sequence[str]]  # CSS class, name, cells

code = Markup("<code>{}</code>").format
strong = Markup("<strong>{}</strong>").format


@dataclasses.dataclass(frozen=True)
class Table:
    """Table that scrolls by itself where it is too wide.

    note: stands below the caption. wordy: the columns of text, which may wrap; the others are numbers.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Row]
    note: str = ""
    wordy: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class Picture:
    """Image file as a data URI."""

    title: str
    alt: str
    uri: str

    def markup(self) -> Markup:
        """Returns the `<img>` element."""
        return Markup('<img src="{}" alt="{}">').format(self.uri, self.alt)


@dataclasses.dataclass(frozen=True)
class Part:
    """Part of a section, shown in the order of these fields.

    folded: all but the heading is hidden until a click on it. wide: the figures are wider than a phone.
    """

    heading: str = ""
    note: str = ""
    warnings: Sequence[str] = ()
    items: Sequence[str] = ()
    legend: Sequence[Line] = ()
    figures: Sequence[Plot | Picture] = ()
    tables: Sequence[Table] = ()
    folded: bool = False
    wide: bool = False


@dataclasses.dataclass(frozen=True)
class Section:
    """Section of the page; `name` is its anchor."""

    name: str
    title: str
    parts: Sequence[Part]


def render(**content: object) -> str:
    """Returns the page; `content` are the variables of `page.html.jinja`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mae_dist.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    return environment.get_template("page.html.jinja").render(content)


def _breakable(name: str) -> Markup:
    """Returns the name with places where a line may break."""
    return Markup(re.sub(r"([._/])(?=\w)", r"\1<wbr>", str(escape(name))))
