"""Trackio: a database of this machine, a Hugging Face Space (TRACKIO_SPACE_ID) or a server (TRACKIO_SERVER_URL)."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from mae_dist.trackers.base import Run, Status, register


@register(
    "trackio",
    package="trackio",
    install="pip install 'mae_dist[trackio]', or in a clone: pip install -e '.[trackio]'",
)
class Trackio:
    """Logs to a run that is resumed by its name, of which the id is a part."""

    def start(self, run: Run) -> int | None:
        self._project = os.environ.get("TRACKIO_PROJECT") or "mae_dist"
        self._name = f"{run.name}-{run.id}"
        last = self._last_step()
        client: Any = importlib.import_module("trackio")
        self._run = client.init(
            project=self._project,
            name=self._name,
            resume="allow",
            config={**run.config, "workdir": run.workdir, "tags": list(run.tags)},
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return last

    def log(self, step: int, scalars: Mapping[str, float], images: Mapping[str, Any]) -> None:
        client: Any = importlib.import_module("trackio")
        self._run.log({**scalars, **{name: client.Image(image) for name, image in images.items()}}, step=step)

    def finish(self, status: Status, summary: Mapping[str, Any]) -> None:
        self._run.finish()

    def _last_step(self) -> int | None:
        """Returns the last step in this machine's database, -1 for none; None if it is sent elsewhere.

        What a Space or a server did not take is kept by the client, and sent when it starts again: their own last step
        would be too low.
        """
        if os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL"):
            return None
        if self._project not in _ask("list", "projects")["projects"]:
            return -1
        if self._name not in _ask("list", "runs", "--project", self._project)["runs"]:
            return -1
        return _ask("get", "run", "--project", self._project, "--run", self._name)["last_step"]


def _ask(*arguments: str) -> dict[str, Any]:
    """Returns the answer of the command `trackio`, the client's public way to read a run."""
    command = [sys.executable, "-m", "trackio.cli", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"`trackio {' '.join(arguments)}` failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)
