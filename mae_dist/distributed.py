"""Start-up of one or many processes, and what only the first of them does."""

import contextlib
import logging as python_logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging

from mae_dist.errors import ConfigError


def initialize(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the processes of one run, before any device is touched.

    With explicit arguments they are used as given (all three are needed). Without, JAX looks whether this is a TPU
    pod, a Slurm or an Open MPI job; anything else is a run of one process.
    """
    given = (coordinator_address, num_processes, process_id)
    if all(value is None for value in given):
        try:
            jax.distributed.initialize()
        except ValueError as error:
            if "coordinator_address should be defined" not in str(error):  # JAX's word for "no cluster found"
                raise ConfigError(
                    f"the cluster this process seems to be in cannot be joined: {error}; give "
                    "--coordinator_address, --num_processes and --process_id"
                ) from error
        return
    flags = f"--coordinator_address={coordinator_address} --num_processes={num_processes} --process_id={process_id}"
    if coordinator_address is None or num_processes is None or process_id is None:
        raise ConfigError(f"{flags}: give all three (the address is host:port of process 0), or none")
    if not 0 <= process_id < num_processes or not coordinator_address.rpartition(":")[2].isdigit():
        raise ConfigError(f"{flags}: the address is host:port, and process ids are 0 to num_processes - 1")
    jax.distributed.initialize(coordinator_address, num_processes, process_id)


@contextlib.contextmanager
def interrupted_between_steps() -> Iterator[Callable[[], None]]:
    """Holds Ctrl-C back until the function it gives is called, which then raises `KeyboardInterrupt`.

    Raised anywhere, it can be swallowed by a callback, or tear a save apart. A second one is not held back.
    """
    pending = []

    def note(number: int, frame: Any) -> None:
        del number, frame
        pending.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("interrupted: stopping after this update; once more to stop at once", file=sys.stderr, flush=True)

    def stop() -> None:
        if pending:
            raise KeyboardInterrupt

    with _handling(signal.SIGINT, note):
        yield stop


@contextlib.contextmanager
def noticing_preemption() -> Iterator[Callable[[], bool]]:
    """Gives a function: whether this process, being the only one, was told to end by SIGTERM, which it then survives.

    Of several processes JAX's own notifier tells all and agrees with them on a step; it keeps the signal.
    """
    noticed = []

    def note(number: int, frame: Any) -> None:
        del number, frame
        if not noticed:
            print("preempted: saving after this update", file=sys.stderr, flush=True)
        noticed.append(True)

    with _handling(signal.SIGTERM, note) if jax.process_count() == 1 else contextlib.nullcontext():
        yield lambda: bool(noticed)


@contextlib.contextmanager
def _handling(number: signal.Signals, handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Has a signal handled so meanwhile; in the main thread, the only one that may say so and that is interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def is_primary() -> bool:
    """Whether this process writes metrics, pictures and log lines."""
    return jax.process_index() == 0


def quiet_unless_primary() -> None:
    """Warnings only from all processes but the first; one process's progress is everyone's."""
    # That there is no TPU on a machine without one is no news; said before the first look at the devices.
    python_logging.getLogger("jax._src.xla_bridge").setLevel(python_logging.WARNING)
    logging.set_verbosity(logging.INFO if is_primary() else logging.WARNING)
    # Orbax reports every internal stage at INFO: its warnings are enough.
    python_logging.getLogger("absl").addFilter(_not_from_libraries)


def _not_from_libraries(record: python_logging.LogRecord) -> bool:
    return record.levelno >= python_logging.WARNING or f"{os.sep}orbax{os.sep}" not in record.pathname
