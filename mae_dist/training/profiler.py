"""Profiler traces of some steps, requested by config or by a signal, for XProf, TensorBoard or Perfetto."""

import contextlib
import shlex
import shutil
import signal
import tempfile
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
from absl import logging
from etils import epath

from mae_dist.config.checks import parse_steps

_UPDATES_BY_SIGNAL = 5


class Profiler:
    """Traces updates of this process into directories `updates_<first>_<last>` of `directory`, a bucket's too.

    A trace that cannot be made or written is a warning: the run is worth more.

    Args:
      directory: where the traces of this process go.
      steps: the updates to trace, see `parse_steps`.
      on_signal: while the main thread is in it, SIGUSR1 asks for a trace of the next updates; other threads get no
        signals.
    """

    def __init__(self, directory: epath.Path, steps: str, *, on_signal: bool):
        self._directory = directory
        self._planned = parse_steps(steps)
        self._asked = False
        self._tracing: range | None = None
        self._local = ""  # the profiler writes to local files only
        self._takes_signal = on_signal
        self._before: Any = None

    def __enter__(self) -> "Profiler":
        self._takes_signal &= threading.current_thread() is threading.main_thread()
        if self._takes_signal:
            self._before = signal.signal(signal.SIGUSR1, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        if self._takes_signal:
            signal.signal(signal.SIGUSR1, self._before)
        if self._tracing is not None:
            self.stop()

    def _ask(self, number: int, frame: object) -> None:
        self._asked = True

    def before(self, step: int) -> None:
        """Begins a trace that is to start with update `step`, before its batch is asked for."""
        if self._tracing is None and (self._asked or step in self._planned):
            last = step + _UPDATES_BY_SIGNAL - 1 if self._asked else self._planned[-1]
            self._asked = False
            self._local = tempfile.mkdtemp(prefix="mae_dist_profile_")
            with self._warning("begun"):
                jax.profiler.start_trace(self._local, create_perfetto_trace=True)
                self._tracing = range(step, last + 1)

    def annotate(self, step: int) -> contextlib.AbstractContextManager[Any]:
        """Names an update in the trace."""
        if self._tracing is None:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("update", step_num=step)

    def ends_with(self, step: int) -> bool:
        """True if `stop` is due after step `step`, once the device has finished it."""
        return self._tracing is not None and step >= self._tracing[-1]

    def stop(self) -> None:
        """Writes the trace, which takes seconds."""
        assert self._tracing is not None
        target = self._directory / f"updates_{self._tracing[0]}_{self._tracing[-1]}"
        self._tracing = None
        with self._warning("written"), jax.transfer_guard("allow"):
            jax.profiler.stop_trace()
            for source in sorted(path for path in Path(self._local).rglob("*") if path.is_file()):
                copy = target / source.relative_to(self._local).as_posix()
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(source.read_bytes())
            logging.info(
                "Profile: tensorboard --logdir=%s, or the .json.gz in ui.perfetto.dev", shlex.quote(str(target))
            )

    @contextlib.contextmanager
    def _warning(self, what: str) -> Generator[None]:
        try:
            yield
        except Exception as error:  # of whatever kind: XLA's, a disk's, a bucket's
            logging.warning("The profile could not be %s: %s", what, error)
        if self._tracing is None:
            shutil.rmtree(self._local, ignore_errors=True)
