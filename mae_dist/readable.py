"""Figures, times and paths as a person reads them. Files hold the exact values."""

import math
import os
import textwrap
from collections.abc import Sequence


def count(value: int) -> str:
    """Returns a count with separators: 1213 -> "1,213"."""
    return f"{value:,}"


def number(value: float) -> str:
    """Returns four significant digits, without an exponent for large values: 0.52 -> "0.5200", 42213 -> "42,210"."""
    rounded = float(f"{value:.4g}")
    return f"{rounded:,.0f}" if 1000 <= abs(rounded) < math.inf else f"{value:#.4g}"


def percent(fraction: float) -> str:
    """Returns a fraction in percent: 0.0312 -> "3.1 %"."""
    return f"{100 * fraction:.1f} %"


def duration(secs: float) -> str:
    """Returns seconds in the two largest units that fit: "0.3 s", "42 s", "3 min 05 s", "1 h 05 min", "2 d 03 h"."""
    if secs < 9.95:
        return f"{secs:.1f} s"
    whole = round(secs)
    for unit, small, below, size in (("d", "h", 86_400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if whole >= below:
            return f"{whole // below} {unit} {whole % below // size:02d} {small}"
    return f"{whole} s"


def num_bytes(value: float) -> str:
    """Returns a size in memory: "512 B", "543 KiB", "1.06 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:,.4g} TiB"


def path(full: str | os.PathLike[str]) -> str:
    """Returns a path relative to the current directory if it is inside that; otherwise, and in a bucket, as it is."""
    name = os.fspath(full)
    if not os.path.isabs(name):
        return name
    try:
        relative = os.path.relpath(name)
    except FileNotFoundError:  # the current directory was deleted
        return name
    return name if relative.split(os.sep)[0] == os.pardir else relative


def wrapped(parts: Sequence[str], separator: str, width: int | None) -> str:
    """Joins parts into one line, or into lines of at most `width` columns that break between parts only."""
    return "\n".join(_lines(parts, separator, width))


def command(words: Sequence[str], width: int | None) -> str:
    """Joins the quoted words of a shell command; a line that is continued ends with a backslash."""
    return " \\\n  ".join(_lines(words, " ", width and width - 4))


def _lines(parts: Sequence[str], separator: str, width: int | None) -> list[str]:
    if width is None:
        return [separator.join(parts)]
    held = separator.join(part.replace(" ", "\0") for part in parts)
    found = textwrap.wrap(held, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return [line.replace("\0", " ") for line in found]
