"""Ctrl-C between two steps."""

import contextlib
import signal
import threading
from collections.abc import Callable, Generator

from mae_dist.errors import say


@contextlib.contextmanager
def interrupted_between_steps() -> Generator[Callable[[], None]]:
    """Holds Ctrl-C back until the function it gives is called, which then raises `KeyboardInterrupt`.

    Raised anywhere, it can be swallowed by a callback, or tear a save apart. A second one is not held back. Where the
    program that we are part of handles Ctrl-C itself, or in another thread than the main one, nothing is changed.
    """
    interrupted = threading.Event()

    def handle(*_: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        say("interrupted: stopping after this step; once more to stop at once")

    def stop() -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield stop
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
