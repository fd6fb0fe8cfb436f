"""Faults a user can cause or cure, the exit code each one ends a command with, and what makes the one of the other.

Every message says what was wrong, the values, and the cure. Our own mistakes are `assert`s and end with code 1.
"""

import os
import select
import sys
from collections.abc import Callable

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


def exit_code_of(command: Callable[[], int]) -> int:
    """Runs a command: a fault of the user is one message and its code; any other exception passes."""
    try:
        code = command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted: the same command continues from the last checkpoint", file=sys.stderr, flush=True)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        if not _output_is_unread():
            raise
        code = EXIT_UNREAD
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = code or EXIT_UNREAD
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left, at the interpreter's end
    return code


def _output_is_unread() -> bool:
    """Whether the reader of our output has ended, as in `… | head`."""
    poll = select.poll()
    poll.register(sys.stdout, 0)  # faults are told without being asked for
    return bool(poll.poll(0))
