"""Weights & Biases, online or offline (WANDB_MODE)."""

import importlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mae_dist.trackers.base import Run, Status, register

_INIT_SECS = 20.0  # W&B's default is 90: the reason is reported sooner, and another attempt follows


@register(
    "wandb",
    package="wandb",
    install="pip install 'mae_dist[wandb]', or in a clone: pip install -e '.[wandb]'",
)
class Wandb:
    """Logs to a run of Weights & Biases that is resumed by its id.

    Online, the server says which steps it has. Offline nothing does: every start writes a directory of its own, and
    what is in it is known only if it was finished. The directory of a start that was killed is deleted and its steps
    are logged again, so `wandb sync` of all directories finds every step once.
    """

    url = ""

    def __init__(self) -> None:
        self._run: Any = None
        self._last_start = Path()

    def start(self, run: Run) -> int:
        client: Any = importlib.import_module("wandb")
        if self._run is not None:
            self._run.finish(exit_code=1)
        root = Path(os.environ.get("WANDB_DIR") or run.directory or ".")
        self._last_start = Path(run.directory or root / "wandb") / f"wandb_{run.id}.json"
        self._step = self._step_before(root, run.last_step)
        tags = [tag for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag]
        timeout = {} if "WANDB_INIT_TIMEOUT" in os.environ else {"init_timeout": _INIT_SECS}
        self._run = client.init(
            id=run.id,
            resume="allow",
            project=os.environ.get("WANDB_PROJECT") or "mae_dist",
            name=os.environ.get("WANDB_NAME") or run.name,
            dir=str(root),
            config=dict(run.config),
            allow_val_change=True,
            tags=[tag[:64] for tag in (*run.tags, *tags)],
            settings=client.Settings(console="off", **timeout),
        )
        if self._run.offline:
            directory = Path(self._run.dir).resolve().parent
            self._write({"directory": os.path.relpath(directory, root), "begins_after": self._step, "last": None})
            return self._step
        self.url = self._run.url or ""
        if self._read():  # offline before
            self._step = max(self._step, self._run.starting_step - 1)
        else:
            self._step = self._run.starting_step - 1
        self._write({})
        return self._step

    def log(self, step: int, scalars: Mapping[str, float], images: Mapping[str, Any]) -> None:
        client: Any = importlib.import_module("wandb")
        pictures = {name: client.Image(image) for name, image in images.items()}
        self._run.log({**scalars, **pictures}, step=step, commit=True)
        self._step = step

    def finish(self, status: Status, summary: Mapping[str, Any]) -> None:
        self._run.summary.update({name: value for name, value in summary.items() if name != "step"})
        if status == "preempted":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if status == "done" else 1)
        if start := self._read():
            self._write({**start, "last": self._step})

    def _step_before(self, root: Path, last_step: int) -> int:
        """Returns the last step of earlier starts, as far as this machine knows; deletes what was not finished."""
        start = self._read()
        if not start:
            return last_step
        if start["last"] is not None:
            return start["last"]
        directory = root / start["directory"]
        if any(directory.glob("*.synced")):  # it is at the server, and cannot be taken back
            return last_step
        shutil.rmtree(directory, ignore_errors=True)
        return start["begins_after"]

    def _read(self) -> dict[str, Any]:
        """Returns what is known of the last start if that was offline, else {}."""
        return json.loads(self._last_start.read_text()) if self._last_start.exists() else {}

    def _write(self, start: Mapping[str, Any]) -> None:
        self._last_start.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._last_start.with_suffix(".tmp")
        temporary.write_text(json.dumps(start))
        temporary.replace(self._last_start)
