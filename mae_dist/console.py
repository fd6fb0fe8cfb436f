"""Arguments and output with any characters; log messages as a person reads them, above progress bars."""

import contextlib
import io
import logging
import os
import re
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import IO, Any

from absl import logging as absl_logging

from mae_dist import names
from mae_dist.errors import ConfigError

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
# A message of several lines, or with a command to copy, is not wrapped.
_KEPT = re.compile(r"\n|python -m| --")
_LIBRARIES = re.compile(r"[/\\](site|dist)-packages[/\\]")


def check_arguments(argv: Sequence[str]) -> None:
    """Raises `ConfigError` for an argument that is not text."""
    for argument in argv:
        if fault := names.text_fault(argument):
            raise ConfigError(f"the argument {argument!r} has {fault}")


def set_up() -> None:
    """Sets up logging, allows every character in the output, and makes a failed save one message, without tracebacks.

    Orbax logs what it raises, and leaves failed tasks behind; tensorstore calls them back when their event loop is
    closed.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(handlers=[_handler], force=True)  # instead of what an import has set up
    set_level(logging.INFO)
    logging.captureWarnings(True)
    logging.getLogger("asyncio").addFilter(_is_news)
    sys.unraisablehook = _report_unraisable


def set_level(level: int) -> None:
    """Sets the lowest level of the messages that a command shows; in another program absl's alone."""
    absl_logging.set_verbosity(logging.getLevelName(level).lower())
    if _handler in logging.root.handlers:
        logging.root.setLevel(level)


def name_process(index: int) -> None:
    """Makes every message name this process, one of several."""
    _handler.process = f"process {index}: "


def show_sources() -> None:
    """Makes every message name its thread and the line that logged it."""
    _handler.shows_sources = True


def width(stream: IO[str]) -> int | None:
    """Returns the columns of the terminal that a stream writes to, None if it is none."""
    if not stream.isatty():
        return None
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80  # 0: nobody has set its size
    except OSError:  # it has just been closed
        return None


def write(text: str) -> None:
    """Writes lines to the standard error output, above progress bars; a terminal that was closed ends nothing."""
    with contextlib.suppress(OSError):
        if sys.stderr.isatty():
            from tqdm import tqdm  # a command that shows nothing need not import it

            tqdm.write(text, file=sys.stderr)
        else:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()


class _Handler(logging.Handler):
    """Writes messages to the standard error output: on a terminal the text, elsewhere with the time of day.

    Libraries show warnings and errors only; INFO is for what this package and users' modules report.
    """

    process = ""
    shows_sources = False

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and "orbax" in record.pathname:
            return False  # it logs, several times, what it raises: our message has it
        is_ours = record.pathname.startswith(_PACKAGE) or not _LIBRARIES.search(record.pathname)
        return record.levelno >= logging.WARNING or is_ours

    def emit(self, record: logging.LogRecord) -> None:
        try:
            write(self.format(record))
        except Exception:
            self.handleError(record)

    def format(self, record: logging.LogRecord) -> str:
        text = logging.Formatter().format(record).rstrip()
        columns = width(sys.stderr)
        prefix = "" if columns else time.strftime("%H:%M:%S ", time.localtime(record.created))
        prefix += self.process
        if record.levelno >= logging.WARNING:
            prefix += f"{record.levelname.lower()}: "
        if self.shows_sources:
            prefix += f"{record.threadName} {record.filename}:{record.lineno}] "
        if columns and not _KEPT.search(text):
            fill = textwrap.TextWrapper(columns, subsequent_indent="    ")
            fill.break_long_words = fill.break_on_hyphens = False
            return fill.fill(prefix + text)
        return prefix + text


_handler = _Handler()


def _is_news(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def _report_unraisable(unraisable: Any) -> None:
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        sys.__unraisablehook__(unraisable)
