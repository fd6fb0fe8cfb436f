"""Arguments and output with any characters, and logs without the tracebacks of libraries."""

import io
import logging
import sys
from collections.abc import Sequence
from typing import Any

from absl import logging as absl_logging

from mae_dist import names
from mae_dist.errors import ConfigError


def check_arguments(argv: Sequence[str]) -> None:
    """Raises `ConfigError` for an argument that is not text."""
    for argument in argv:
        if fault := names.text_fault(argument):
            raise ConfigError(f"the argument {argument!r} has {fault}")


def set_up() -> None:
    """Allows every character in the output, and makes a failed save one message instead of hundreds of tracebacks.

    Orbax logs what it raises, and leaves failed tasks behind; tensorstore calls them back when their event loop is
    closed.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    absl_logging.get_absl_handler().addFilter(_without_traceback_of_orbax)
    logging.getLogger("asyncio").addFilter(_is_news)
    sys.unraisablehook = _report_unraisable


def _without_traceback_of_orbax(record: logging.LogRecord) -> bool:
    if record.exc_info and "orbax" in record.pathname:
        record.exc_info = record.exc_text = None
    return True


def _is_news(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def _report_unraisable(unraisable: Any) -> None:
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        sys.__unraisablehook__(unraisable)
