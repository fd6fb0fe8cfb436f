"""The process that sends a run's records to one tracker: `python -m mae_dist.trackers.child`, started by `Tracking`.

It reads metrics.jsonl and pictures/ from the last step that the tracker has. So the file is the queue: nothing is lost
while a tracker is down or slow, and after any number of restarts it has each step once.

The first line of the standard input is the run; an empty line says that there are new records; `{"end": …}` that there
will be no more. Where the input ends without that, the training was killed. Messages go to the standard output.
"""

import contextlib
import fcntl
import importlib
import json
import math
import operator
import os
import re
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import cv2
import numpy as np
from etils import epath

from mae_dist.storage import is_local, read_text, write_text_atomically
from mae_dist.trackers.base import SAID, Run, Status, Tracker

_RETRY_SECS = (5.0, 300.0)  # after the first failure, and at most
_BUCKET_SECS = 10.0  # between two readings of a file in a bucket
_HAS_ALL = "metrics.jsonl has everything"
_KILLED_SECS = 20.0  # to send what is left after the training was killed


class State:
    """The id and last step of one tracker, kept across starts in `trackers/<name>.json`."""

    def __init__(self, path: epath.Path):
        self._path = path
        try:
            known = json.loads(read_text(path) or "{}")
        except ValueError as error:
            raise ValueError(f"{path} is corrupted: delete it to begin a new remote run") from error
        self.id: str = known.get("id") or uuid.uuid4().hex[:12]
        self.step: int = known.get("step", -1)  # the last that was logged
        self.save(done=False)

    def save(self, *, done: bool) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(self._path, json.dumps({"id": self.id, "step": self.step, "done": done}) + "\n")


class Follower:
    """Logs the steps that a tracker lacks.

    Args:
      tracker: of the user's choice.
      describe: (id, last step) -> the run.
      state: of this tracker.
      records: metrics.jsonl.
      pictures: a directory of `<name>_<step>.png` files.
    """

    def __init__(
        self,
        tracker: Tracker,
        describe: Callable[[str, int], Run],
        state: State,
        records: epath.Path,
        pictures: epath.Path,
    ):
        self._tracker, self._describe, self._state = tracker, describe, state
        self._records, self._pictures = records, pictures
        self._started = False
        self._read = 0  # bytes of `records`

    def catch_up(self) -> None:
        """Logs what is new; raises the tracker's exceptions, and starts it again at the next call."""
        try:
            if not self._started:
                has = self._tracker.start(self._describe(self._state.id, self._state.step))
                self._state.step = self._state.step if has is None else has
                self._started, self._read = True, 0
            for step, scalars, images in self._news():
                self._tracker.log(step, scalars, images)
                self._state.step = step
                self._state.save(done=False)
        except Exception:
            self._started = False
            raise

    def finish(self, status: Status, summary: Mapping[str, Any]) -> None:
        """Ends the tracker, which has everything then."""
        self._tracker.finish(status, summary)
        self._state.save(done=status == "done")

    def _news(self) -> Iterator[tuple[int, dict[str, float], dict[str, np.ndarray]]]:
        """Yields (step, scalars, images) for each step after the last one, in order."""
        after = self._state.step
        records = {record["step"]: record for record in self._new_records() if record["step"] > after}
        if not records:
            return
        pictures = {step: name for step, name in self._all_pictures() if after < step <= max(records)}
        for step in sorted(records.keys() | pictures.keys()):
            record = records.get(step, {})
            scalars = {name: math.nan if value is None else value for name, value in record.items() if name != "step"}
            yield step, scalars, self._images(pictures[step]) if step in pictures else {}

    def _new_records(self) -> list[dict[str, Any]]:
        """Returns the records since the last call; a line without its end is being written."""
        if not self._records.exists():
            return []
        with self._records.open("rb") as file:
            file.seek(self._read)
            lines = file.read().rpartition(b"\n")[0]
        self._read += len(lines) + bool(lines)
        return [json.loads(line) for line in lines.splitlines()]

    def _all_pictures(self) -> Iterator[tuple[int, str]]:
        if self._pictures.is_dir():
            for path in self._pictures.iterdir():
                if match := re.fullmatch(r"step_(\d+)\.png", path.name):
                    yield int(match[1]), path.name

    def _images(self, name: str) -> dict[str, np.ndarray]:
        encoded = np.frombuffer((self._pictures / name).read_bytes(), np.uint8)
        image = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
        return {} if image is None else {"reconstruction": np.ascontiguousarray(image[..., ::-1])}


class Commands:
    """The commands of the training, read by a thread of its own while the tracker may block."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._woken = False
        self.end: Status | None = None

    def read(self) -> None:
        """Reads to the end of the input; then this process ends in time, even if the tracker blocks."""
        end: dict[str, Any] = {"end": "killed", "secs": _KILLED_SECS}
        for line in sys.stdin.buffer:
            if line.strip():
                end = json.loads(line)
                break
            with self._changed:
                self._woken = True
                self._changed.notify()
        with self._changed:
            self.end = cast(Status, end["end"])
            self._changed.notify()
        threading.Event().wait(end["secs"])
        os._exit(1)

    def wait_for_records(self) -> None:
        """Waits until there are new records since the last call, or the training has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._woken or self.end)
            self._woken = False

    def pause(self, secs: float) -> None:
        """Waits `secs` seconds, or until the training ends."""
        with self._changed:
            self._changed.wait_for(lambda: self.end, timeout=secs)


def follow(
    name: str, follower: Follower, commands: Commands, report: Callable[[str, str], None], pause: float
) -> Status | None:
    """Logs records as they come, until the training ends and everything is logged.

    Args:
      name: of the tracker, for messages.
      follower, commands: of this process.
      report: (level, message): "warning" once when the tracker fails, "info" when it works again.
      pause: seconds between two readings.

    Returns:
      How the training ended; None if the tracker lacks something then.
    """
    failures = 0  # in a row
    while True:
        end = commands.end
        try:
            follower.catch_up()
        except Exception as error:
            if commands.end:  # no more attempts, even if this one was begun before
                report("warning", f"{name} lacks steps: {said(error)}. {_HAS_ALL}, and the same command sends the rest")
                return None
            if not failures:
                report("warning", f"{name} fails: {said(error)}. {_HAS_ALL}, and it is sent the rest when it answers")
            failures += 1
            commands.pause(min(_RETRY_SECS[0] * 2 ** (failures - 1), _RETRY_SECS[1]))
            continue
        if failures:
            report("info", f"{name} answers again, and has every step so far")
        failures = 0
        if end:
            return end
        commands.pause(pause)
        commands.wait_for_records()


def said(error: BaseException) -> str:
    """Returns an exception as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}".rstrip(".: ")


def main() -> None:
    """Runs this process."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # sent to all processes of a job: the training ends this one
    with contextlib.suppress(OSError):
        os.nice(10)
    output = open(os.dup(1), "w", buffering=1)  # noqa: SIM115 (of this process)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # what clients print
    os.dup2(null, 2)

    def report(level: str, text: str) -> None:
        with contextlib.suppress(OSError):  # the training is gone
            print(json.dumps([level, text]), file=output)

    given = json.loads(sys.stdin.buffer.readline())
    commands = Commands()
    threading.Thread(target=commands.read, daemon=True).start()
    code = SAID
    try:
        code = _run(given, commands, report)
    except BaseException as error:
        report("warning", f"{given['tracker']} fails: {said(error)}. {_HAS_ALL}, and the same command sends the rest")
    os._exit(code)  # not by way of the clients' hooks


def _run(given: Mapping[str, Any], commands: Commands, report: Callable[[str, str], None]) -> int:
    workdir, name = epath.Path(given["workdir"]), given["tracker"]
    directory = workdir / "trackers"
    local = is_local(workdir)
    if local:  # the process of a start that was killed may be sending what it had left
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / f".{name}.lock", os.O_CREAT | os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX)
    state = State(directory / f"{name}.json")

    def describe(id_: str, last_step: int) -> Run:
        kept = str(directory) if local else ""
        return Run(id_, given["name"], given["workdir"], kept, given["config"], given["tags"], last_step)

    tracker: Tracker = operator.attrgetter(given["class"])(importlib.import_module(given["module"]))()
    follower = Follower(tracker, describe, state, workdir / given["records"], workdir / given["pictures"])
    end = follow(name, follower, commands, report, 0.0 if local else _BUCKET_SECS)
    if end is None:
        return SAID
    summary = json.loads(read_text(workdir / given["summary"]) or "{}") if end == "done" else {}
    follower.finish(end, summary)
    url = getattr(tracker, "url", "")
    report("info", f"{name} has every step to {state.step}{f': {url}' if url else ''}")
    return 0


if __name__ == "__main__":
    main()
