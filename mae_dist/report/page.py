"""The HTML of a report: elements that escape what they hold, tables, figures, and the one self-contained document.

Nothing in it is loaded from anywhere, and its content security policy says so to the browser; there is no script.
"""

import html
import re
from collections.abc import Iterable, Sequence

from mae_dist.report.plot import Line, Plot, to_svg

_CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --soft: #59636e; --line: #d5dae0; --wash: #f4f6f8;
  --accent: #0060a8; --warn: #9a3b00; --warn-wash: #fff3ea; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e4e7eb; --soft: #a0a9b4;
  --line: #343b44; --wash: #1d2127; --accent: #7cbcf5; --warn: #ffb27d; --warn-wash: #33241a; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: break-word;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
main, header { max-width: 76rem; margin: 0 auto; padding: 0 clamp(1rem, 4vw, 2.5rem); }
header { padding-top: clamp(1.25rem, 4vw, 2.5rem); }
h1 { font-size: clamp(1.5rem, 1.2rem + 1.6vw, 2.2rem); line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 3rem 0 .75rem; padding-top: .9rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; line-height: 1.35; margin: 1.75rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; }
a { color: var(--accent); }
code { font: .88em ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.soft, figcaption small, caption small { color: var(--soft); }
.soft { font-size: .92rem; }
nav { margin: 1rem 0 0; }
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; padding: 0; margin: 0; list-style: none; }
ul.plain { padding-left: 1.1rem; margin: .5rem 0; max-width: 54rem; }
ul.plain li { margin: .25rem 0; }
.warn { background: var(--warn-wash); color: var(--warn); border-radius: .4rem; padding: .6rem .9rem; margin: .75rem 0;
  max-width: 54rem; }
.warn p { margin: 0; }
.scroll { overflow-x: auto; margin: .75rem 0 1.25rem; }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0 0 .45rem; position: sticky; left: 0; max-width: 88vw; }
caption small { display: block; font-weight: 400; }
th, td { padding: .34rem .8rem .34rem 0; text-align: right; vertical-align: baseline; border-bottom: 1px solid
  var(--line); white-space: nowrap; }
thead th { font-weight: 600; color: var(--soft); font-size: .84rem; vertical-align: bottom; }
th[scope=row], .left { text-align: left; }
th[scope=row] { font-weight: 500; position: sticky; left: 0; background: var(--paper); }
td.wrap { white-space: normal; overflow-wrap: anywhere; min-width: 9rem; max-width: 34rem; }
tr.mean > * { font-weight: 650; background: var(--wash); }
tr.mean th[scope=row] { font-weight: 650; background: var(--wash); padding-left: .5rem; }
tr.member th[scope=row] { padding-left: 1.4rem; }
tr.member > * { color: var(--soft); }
.plots { display: grid; gap: 1.5rem 2rem; margin: .75rem 0 1.5rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .95rem; font-weight: 600; margin-bottom: .3rem; }
figcaption small { display: block; font-weight: 400; font-size: .86rem; }
svg.plot { display: block; width: 100%; height: auto; color: var(--ink); overflow: visible; }
svg.white { background: #fff; color: #1b1f24; border-radius: .25rem; }
svg.plot text { font-family: inherit !important; }
figure img { display: block; width: 100%; height: auto; border-radius: .25rem; background: #fff; }
.plots.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 32rem), 1fr)); }
ul.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.3rem; padding: 0; margin: .6rem 0 .9rem; list-style: none;
  font-size: .9rem; }
ul.legend li { display: flex; align-items: center; gap: .5rem; overflow-wrap: anywhere; }
ul.legend svg { flex: none; width: 1.9rem; height: .7rem; }
details { margin: .75rem 0; }
summary { cursor: pointer; font-weight: 600; }
footer { margin: 3rem 0 2rem; padding-top: .9rem; border-top: 1px solid var(--line); }
@media (max-width: 40rem) { body { font-size: 15px; } th, td { padding-right: .65rem; }
  th[scope=row] { max-width: 9.5rem; min-width: 7.5rem; white-space: normal; overflow-wrap: break-word; }
  .plots { gap: 1.25rem; } h2 { margin-top: 2.25rem; } }
@page { size: A4; margin: 14mm 13mm; }
@media print {
  body { font-size: 9.5pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main, header { max-width: none; padding: 0; }
  nav { display: none; }
  h2 { margin-top: 1.6rem; }
  h2, h3, caption, ul.legend, section > p.soft { break-after: avoid; }
  figure, tr, .warn { break-inside: avoid; }
  thead { display: table-header-group; }
  .scroll { overflow: visible; }
  table { font-size: 7.2pt; max-width: 100%; }
  caption { font-size: 9pt; }
  th, td { padding-right: .45rem; white-space: normal; overflow-wrap: anywhere; }
  td.wrap { min-width: 0; }
  th[scope=row] { min-width: 0; max-width: 5.5cm; position: static; overflow-wrap: break-word; }
  thead th { font-size: 7pt; overflow-wrap: normal; }
  .plots { grid-template-columns: 1fr 1fr; gap: 1rem 1.4rem; }
  .plots.wide { grid-template-columns: 1fr 1fr; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""


class Html(str):
    """Text that is markup already; any other text is escaped where it is put in."""


Content = str | Iterable["Content"] | None


def render(content: Content) -> Html:
    """Content as markup."""
    if content is None:
        return Html("")
    if isinstance(content, Html):
        return content
    if isinstance(content, str):
        return Html(html.escape(content))
    return Html("".join(render(part) for part in content))


def tag(name: str, /, *content: Content, **attributes: str) -> Html:
    """An element; `class_="x"` is the attribute class, `aria_label` aria-label."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value, quote=True)}"' for key, value in attributes.items()
    )
    return Html(f"<{name}{given}>{render(content)}</{name}>")


def void(name: str, /, **attributes: str) -> Html:
    """An element without content or end."""
    return Html(tag(name, **attributes).removesuffix(f"</{name}>"))


Row = tuple[str, Sequence[Content]]  # class of the row, cells


def table(caption: str, head: Sequence[str], rows: Iterable[Row], *, note: str = "", left: Sequence[int] = ()) -> Html:
    """A table that scrolls by itself where it is too wide; the first cell of each row names it.

    Columns in `left` are text, which may wrap; the others are figures.
    """

    def cell(number: int, content: Content) -> Html:
        if number == 0:  # names may break where their parts do
            return tag("th", Html(re.sub(r"([._/])(?=\w)", r"\1<wbr>", render(content))), scope="row")
        return tag("td", content, class_="left wrap") if number in left else tag("td", content)

    header = [
        tag("th", name, scope="col", class_="left") if i == 0 or i in left else tag("th", name, scope="col")
        for i, name in enumerate(head)
    ]
    body = [
        tag("tr", [cell(i, content) for i, content in enumerate(cells)], **({"class_": kind} if kind else {}))
        for kind, cells in rows
    ]
    title = tag("caption", caption, tag("small", note) if note else None)
    return tag(
        "div",
        tag("table", title, tag("thead", tag("tr", header)), tag("tbody", body)),
        class_="scroll",
        role="region",
        aria_label=caption,
        tabindex="0",
    )


def figure(plot: Plot, note: str = "") -> Html:
    """A drawn figure with its title; what it shows is its accessible name."""
    kind = "plot white" if plot.on_white else "plot"
    svg = to_svg(plot).replace("<svg", f'<svg class="{kind}" role="img" aria-label="{html.escape(plot.alt)}"', 1)
    return tag("figure", tag("figcaption", plot.title, tag("small", note) if note else None), Html(svg))


def picture(uri: str, caption: str, alt: str) -> Html:
    return tag("figure", tag("figcaption", caption), void("img", src=uri, alt=alt))


def plots(items: Sequence[Html], *, wide: bool = False) -> Html:
    """Figures side by side, as many as there is room for."""
    return tag("div", items, class_="plots wide" if wide else "plots") if items else Html("")


def legend(lines: Sequence[Line]) -> Html:
    """What the colours and dashes of the figures below it mean."""

    def entry(line: Line) -> Html:
        label, color, dashes = line
        pattern = "" if dashes == "-" else " ".join(f"{3 * part:g}" for part in dashes[1])
        stroke = void("line", x1="1", x2="37", y1="7", y2="7", stroke=color, stroke_width="4", stroke_dasharray=pattern)
        return tag("li", tag("svg", stroke, tag("title", ""), viewBox="0 0 38 14", aria_hidden="true"), label)

    return tag("ul", [entry(line) for line in lines], class_="legend")


def warning(*content: Content) -> Html:
    return tag("div", tag("p", content), class_="warn")


def section(name: str, title: str, *content: Content) -> tuple[str, str, Html]:
    """(anchor, title, markup) of a part of the page."""
    return name, title, tag("section", tag("h2", title, id=name), content, aria_labelledby=name)


def document(title: str, head: Content, sections: Sequence[tuple[str, str, Html]], foot: Content) -> str:
    """The whole page."""
    links = [tag("li", tag("a", text, href=f"#{name}")) for name, text, _ in sections]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    meta = [
        void("meta", charset="utf-8"),
        void("meta", name="viewport", content="width=device-width, initial-scale=1"),
        void("meta", name="color-scheme", content="light dark"),
        void("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("title", title),
        tag("style", Html(_CSS)),
    ]
    body = [
        tag("header", tag("h1", title), head, tag("nav", tag("ul", links), aria_label="Contents")),
        tag("main", [markup for *_, markup in sections], tag("footer", foot, class_="soft")),
    ]
    return f'<!DOCTYPE html>\n<html lang="en">{tag("head", meta)}{tag("body", body)}</html>\n'
