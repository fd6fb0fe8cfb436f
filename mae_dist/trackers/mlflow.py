"""MLflow, at MLFLOW_TRACKING_URI or where its client keeps things without that."""

import importlib
import os
import re
import time
from collections.abc import Mapping
from typing import Any

from mae_dist.trackers.base import Run, Status, register

_ID = "mae_dist.id"
_STEP = "step"  # a metric of every step, stored with its others in one batch: it says which steps are there
_ENDS: dict[Status, str] = {"done": "FINISHED", "failed": "FAILED"}


@register(
    "mlflow",
    package="mlflow",
    install="pip install 'mae_dist[mlflow]', or in a clone: pip install -e '.[mlflow]'",
)
class MLflow:
    """Logs to a run that is found again by a tag; uses no global state of the client."""

    url = ""

    def __init__(self) -> None:
        # Its own are seven retries of two minutes; ours follow, and the reason is reported sooner.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

    def start(self, run: Run) -> int:
        self._entities: Any = importlib.import_module("mlflow.entities")
        self._client: Any = importlib.import_module("mlflow").MlflowClient()
        experiment = self._experiment_id()
        found = self._client.search_runs([experiment], f"tags.`{_ID}` = '{run.id}'")
        if found:
            self._id, known = found[0].info.run_id, found[0].data.params
            self._client.update_run(self._id, status="RUNNING")
        else:
            tags = {_ID: run.id, "workdir": run.workdir}
            self._id = self._client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
            known = {}
        new = [self._entities.Param(name, str(value)[:6000]) for name, value in run.config.items() if name not in known]
        for batch in _batches(new, 100):  # a value of MLflow's cannot be changed: that of the first start stays
            self._client.log_batch(self._id, params=batch)
        uri = self._client.tracking_uri
        self.url = f"{uri}/#/experiments/{experiment}/runs/{self._id}" if uri.startswith("http") else uri
        return max((metric.step for metric in self._client.get_metric_history(self._id, _STEP)), default=-1)

    def _experiment_id(self) -> str:
        if experiment_id := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return experiment_id
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "mae_dist"
        experiment = self._client.get_experiment_by_name(name)
        return experiment.experiment_id if experiment else self._client.create_experiment(name)

    def log(self, step: int, scalars: Mapping[str, float], images: Mapping[str, Any]) -> None:
        for name, image in images.items():
            self._client.log_image(self._id, image, artifact_file=f"pictures/{name}_{step:08d}.png")
        now = int(1000 * time.time())
        values = {re.sub(r"[^\w\-. /]", "_", name)[:250]: value for name, value in scalars.items()}
        metrics = [self._entities.Metric(name, value, now, step) for name, value in values.items()]
        *full, rest = _batches(metrics, 999) or [[]]
        for batch in full:
            self._client.log_batch(self._id, metrics=batch)
        self._client.log_batch(self._id, metrics=[*rest, self._entities.Metric(_STEP, step, now, step)])

    def finish(self, status: Status, summary: Mapping[str, Any]) -> None:
        if summary:
            self._client.log_dict(self._id, dict(summary), "summary.json")
        self._client.set_terminated(self._id, _ENDS.get(status, "KILLED"))


def _batches(items: list[Any], size: int) -> list[list[Any]]:
    return [items[first : first + size] for first in range(0, len(items), size)]
