"""Ctrl-C between two steps."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from mae_dist.errors import say


@contextlib.contextmanager
def interrupted_between_steps() -> Iterator[Callable[[], None]]:
    """Holds Ctrl-C back until the function it gives is called, which then raises `KeyboardInterrupt`.

    Raised anywhere, it can be swallowed by a callback, or tear a save apart. A second one is not held back. Only
    Python's own answer to Ctrl-C is: where the program that we are part of has another, or in a thread that is never
    interrupted, nothing is changed.
    """
    pending = []

    def note(number: int, frame: Any) -> None:
        del number, frame
        pending.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        say("interrupted: stopping after this update; once more to stop at once")

    def stop() -> None:
        if pending:
            raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield stop
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
