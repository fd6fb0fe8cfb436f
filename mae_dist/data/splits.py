"""Split expressions as TFDS writes them ("train[:80%]", "test+train[100:]"), for sources that are not TFDS."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from mae_dist.errors import ConfigError

_PART = re.compile(r"(?P<name>\w+)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


class Span(NamedTuple):
    """Examples start .. stop - 1 of one base split."""

    name: str
    start: int
    stop: int


def parse_split(split: str, sizes: Mapping[str, int]) -> list[Span]:
    """Resolves a split expression.

    Args:
      split: base splits with optional [start:stop] in examples or percent, joined by "+".
      sizes: number of examples of each base split.

    Returns:
      Non-empty spans, in the order written.

    Raises:
      ConfigError: not an expression, an unknown base split, or no example selected.
    """
    spans = []
    for part in split.split("+"):
        match = _PART.fullmatch(part.strip())
        if match is None or match["name"] not in sizes:
            raise ConfigError(
                f"split {split!r}: {part.strip()!r} is not one of {', '.join(sizes)}, "
                "with an optional slice such as train[:80%] or test[100:200]"
            )
        size = sizes[match["name"]]
        start = _boundary(match["start"], size, 0)
        stop = _boundary(match["stop"], size, size)
        if start < stop:
            spans.append(Span(match["name"], start, stop))
    if not spans:
        raise ConfigError(f"split {split!r} selects no example; the base splits hold {dict(sizes)}")
    return spans


def _boundary(text: str | None, size: int, default: int) -> int:
    """Returns one slice end, in examples, clipped to the split; rounds a percentage to the closest, as TFDS does."""
    if text is None:
        return default
    value = round(int(text[:-1]) * size / 100) if text.endswith("%") else int(text)
    return min(max(value + size if value < 0 else value, 0), size)
