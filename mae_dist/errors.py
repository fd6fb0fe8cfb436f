"""User-facing exceptions, their exit codes, and the wrapper that turns one into the other.

Every message says what was wrong, the values, and the cure. Our own mistakes are `assert`s and end with code 1.
"""

import contextlib
import difflib
import os
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
EXIT_UNREAD = 141  # nothing reads the output any more, as after `| head`; the code of SIGPIPE in shells


class UserError(ValueError):
    """Base of the exceptions that are reported as one message without a traceback."""

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


def nearest_divisor(number: int, wanted: int) -> int:
    """Returns the divisor of `number` that is closest to `wanted`, for a message about one that does not divide."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda divisor: abs(divisor - wanted))


def exit_code_of(command: Callable[[], int]) -> int:
    """Runs a command and returns its exit code: a fault of the user is one message, any other exception passes.

    Nothing is printed where the reader of the standard output has ended (`| head`); a full disk behind it is a fault.
    SIGPIPE stays ignored, as Python has it: by default it would kill a training within a save.
    """
    failure = None
    try:
        code = command()
    except UserError as error:
        say(f"error: {error}")
        code = error.exit_code
    except KeyboardInterrupt:
        say("interrupted: the same command continues from the last checkpoint")
        code = EXIT_INTERRUPTED
    except OSError as error:
        code, failure = EXIT_DONE, error
    try:
        print(end="\n" if failure else "", flush=True)  # one more line shows whether the output fails
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the interpreter's end
        if isinstance(error, BrokenPipeError):
            return code or EXIT_UNREAD
        say(f"error: the output cannot be written: {error}. Free some space, or send it elsewhere")
        return code or EXIT_STORAGE
    if failure:
        raise failure
    return code


def say(message: str) -> None:
    """Prints to the standard error output, whether or not anything can be written there any more.

    For signal handlers and threads too: unlike `print` it waits for no lock, and raises nothing amid other work.
    """
    with contextlib.suppress(OSError):
        over = "\r\033[K" if os.isatty(2) else ""  # erases the line that a progress bar stands on
        os.write(2, f"{over}{message}\n".encode(errors="backslashreplace"))


def open_closed_streams() -> None:
    """Opens the null device for each standard stream that is closed (`>&-`).

    The next file that is opened would get its number otherwise, and what libraries print.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            stream = open(os.devnull, "r" if name == "stdin" else "w")  # noqa: SIM115 (gets the lowest free number)
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
