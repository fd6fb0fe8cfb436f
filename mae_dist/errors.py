"""Faults a user can cause or cure, the exit code each one ends a command with, and what makes the one of the other.

Every message says what was wrong, the values, and the cure. Our own mistakes are `assert`s and end with code 1.
"""

import contextlib
import difflib
import os
import select
import sys
from collections.abc import Callable, Iterable

EXIT_DONE = 0
EXIT_INTERNAL = 1  # an unexpected Python exception: a bug, please report it
EXIT_CONFIG = 2
EXIT_DATA = 3
EXIT_DIVERGED = 4
EXIT_STORAGE = 5
EXIT_INTERRUPTED = 130  # Ctrl-C, as shells have it
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: saved; the same command continues
EXIT_STALLED = 76  # no progress within a deadline; the same command continues
EXIT_PEER_LOST = 77  # another process of the run is gone; the same command continues
EXIT_UNREAD = 141  # nobody reads the output any more, as after `| head`; what shells make of SIGPIPE


class UserError(ValueError):
    """Base of the faults that are reported as one message without a traceback."""

    exit_code = EXIT_INTERNAL


class ConfigError(UserError):
    """A config field, or two fields together, that cannot work."""

    exit_code = EXIT_CONFIG


class DataFault(UserError):
    """A missing, truncated or undecodable file or record, or a label out of range."""

    exit_code = EXIT_DATA


class Diverged(UserError):
    """Too many consecutive steps gave a non-finite gradient."""

    exit_code = EXIT_DIVERGED


class StorageFault(UserError):
    """A workdir that cannot be read or written, or a checkpoint that does not fit the config."""

    exit_code = EXIT_STORAGE


def nearest(value: str, choices: Iterable[str]) -> str:
    """Returns " Did you mean …?" with the choice closest to `value`, or nothing if none is close."""
    close = difflib.get_close_matches(value, list(choices), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def exit_code_of(command: Callable[[], int]) -> int:
    """Runs a command: a fault of the user is one message and its code; any other exception passes."""
    try:
        code = command()
    except UserError as error:
        say(f"error: {error}")
        code = error.exit_code
    except KeyboardInterrupt:
        say("interrupted: the same command continues from the last checkpoint")
        code = EXIT_INTERRUPTED
    except OSError as error:
        if not _is_of_the_output(error):
            raise
        code = _unwritten(error)
    try:
        sys.stdout.flush()
    except OSError as error:
        code = code or _unwritten(error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left, at the interpreter's end
    return code


def say(message: str) -> None:
    """Prints to the standard error output, whether or not anything can be written there any more.

    For signal handlers and threads too: unlike `print` it waits for no lock, and nothing is raised amid other work.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"{message}\n".encode(errors="backslashreplace"))


def open_closed_streams() -> None:
    """Starts this process once more if a standard stream is closed (`>&-`), with the null device in its place.

    Else the next file that is opened gets its number, and what libraries print. Before anything else: loggers keep the
    stream that they find.
    """
    closed = [number for number, stream in enumerate((sys.stdin, sys.stdout, sys.stderr)) if stream is None]
    if closed:
        null = os.open(os.devnull, os.O_RDWR)
        for number in closed:
            os.dup2(null, number)
            os.set_inheritable(number, True)  # `null` may be that number itself
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _unwritten(error: OSError) -> int:
    """The exit code after the standard output could not be written."""
    if _output_is_unread():
        return EXIT_UNREAD
    say(f"error: the output cannot be written: {error}. Free some space, or send it elsewhere")
    return EXIT_STORAGE


def _is_of_the_output(error: OSError) -> bool:
    """True if the standard output is what could not be written: one more empty line is tried."""
    if isinstance(error, BrokenPipeError):
        return _output_is_unread()
    try:
        if error.filename is None:
            print(flush=True)
    except OSError as again:
        return again.errno == error.errno
    return False


def _output_is_unread() -> bool:
    """True if the reader of our output has ended, as in `… | head`, or its terminal was closed."""
    poll = select.poll()
    poll.register(sys.stdout, 0)  # faults are told without being asked for
    return bool(poll.poll(0))
