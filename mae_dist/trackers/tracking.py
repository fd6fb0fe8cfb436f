"""Starts the processes that send a run's records to its trackers, and ends them with the run."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from mae_dist.storage import read_text
from mae_dist.trackers.base import SAID, TRACKERS, Status

# Seconds that an end waits for the trackers; the same command sends what they lack then.
_END_SECS = {"done": 30.0}
_OTHER_END_SECS = 10.0
_LATER_SECS = 5.0  # after which a process ends by itself, if the training does not end it
_log = logging.getLogger(__name__)


class Tracking:
    """The trackers of a run, each in a process of its own: none of them can stop, slow or change the training.

    Clients install signal handlers and exit hooks, capture the output, start services and wait without limit at the
    end; all of that stays in their processes. These read metrics.jsonl by themselves, each time that they are sent a
    line.

    Args:
      names: of the trackers, checked; () does nothing.
      workdir: of the run.
      run: a description of the run: the config by dotted name, tags, and names of files in `workdir`.
      progress: called while the end waits.

    Attributes:
      status: how the run ended, unless by an exception.
    """

    def __init__(
        self,
        names: Sequence[str],
        workdir: epath.Path,
        run: Mapping[str, Any],
        progress: Callable[[], None] = lambda: None,
    ):
        self._names, self._workdir, self._run, self._progress = tuple(dict.fromkeys(names)), workdir, run, progress
        self._processes: dict[str, _Process] = {}
        self.status: Status = "failed"

    def start(self, *, finished: bool = False) -> None:
        """Starts the processes, once metrics.jsonl has what this start of the run keeps of it.

        Of a `finished` run, of those trackers alone that do not have everything.
        """
        for name in self._names:
            if not (finished and self._known(name).get("done")):
                try:
                    self._processes[name] = _Process(name, self._workdir, self._run)
                except OSError as error:
                    _log.warning(
                        "%s cannot be started: %s. metrics.jsonl has everything, and the same command sends it",
                        name,
                        error,
                    )

    def wake(self) -> None:
        """Says that there are new records."""
        for process in self._processes.values():
            process.send(b"\n")

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Waits for the processes, for a limited time, and ends them."""
        if kind is not None and not issubclass(kind, Exception) and self.status == "failed":
            self.status = "interrupted"
        secs = _END_SECS.get(self.status, _OTHER_END_SECS)
        try:
            for process in self._processes.values():
                process.send(json.dumps({"end": self.status, "secs": secs + _LATER_SECS}).encode() + b"\n")
            deadline = time.monotonic() + secs
            while time.monotonic() < deadline and not all(p.ended(0.1) for p in self._processes.values()):
                self._progress()
        finally:
            for name, process in self._processes.items():
                if process.kill():
                    step = self._known(name).get("step", -1)
                    _log.warning(
                        "%s took more than %g s to end, after step %d: metrics.jsonl has everything, and the same "
                        "command sends the rest",
                        *(name, secs, step),
                    )

    def _known(self, name: str) -> dict[str, Any]:
        try:
            return json.loads(read_text(self._workdir / "trackers" / f"{name}.json") or "{}")
        except ValueError:
            return {}


class _Process:
    """The process of one tracker."""

    def __init__(self, name: str, workdir: epath.Path, run: Mapping[str, Any]):
        self._name, self._killed = name, False
        make = TRACKERS.get(name).make
        about = {**run, "tracker": name, "workdir": os.fspath(workdir), "module": make.__module__}
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "JAX_PLATFORMS": "cpu",  # a user's module may import JAX, and the accelerator is the training's
        }
        env.pop("WANDB_SERVICE", None)  # the caller's own service, if a notebook has one
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "mae_dist.trackers.child"],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C and signals to the training's group are for the training
        )
        assert self._popen.stdin is not None
        self._input = self._popen.stdin.fileno()
        self.send(json.dumps({**about, "class": make.__qualname__}).encode() + b"\n")
        os.set_blocking(self._input, False)
        self._reader = threading.Thread(target=self._log_output, daemon=True)
        self._reader.start()

    def send(self, line: bytes) -> None:
        """Sends a line, unless the process has ended or does not read."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._input, line)

    def _log_output(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            try:
                level, text = json.loads(line)
            except ValueError:  # printed by something that Python imports at its start
                continue
            _log.log(logging.getLevelNamesMapping()[level.upper()], "%s", text)
        code = self._popen.wait()
        if code not in (0, SAID) and not self._killed:
            _log.warning(
                "The process of %s ended with code %d: metrics.jsonl has everything, and the next start sends the rest",
                *(self._name, code),
            )

    def ended(self, secs: float) -> bool:
        """Waits for the end, at most `secs`."""
        try:
            self._popen.wait(secs)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> bool:
        """Returns True if the process was still there."""
        self._killed = self._popen.poll() is None
        if self._killed:
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()
        self._reader.join(1.0)
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None:
                pipe.close()
        return self._killed
