"""Searches the settings with which a training fits devices and steps fastest: mesh, remat, shard_state, exchange.

Theory gives every setting a least time: FLOPs, exchanges, and the state read and written once. Settings are compiled in
that order, until none that is left could be faster than the best one that fits.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from mae_dist import errors
from mae_dist.config import get
from mae_dist.data.from_config import Data
from mae_dist.plan import planning, topology

FIELDS = ("mesh.data", "mesh.fsdp", "mesh.tensor", "model.remat", "optim.shard_state", "optim.grad_exchange")
COMPILATIONS = 8  # besides the first
_BATCH_COMPILATIONS = 3  # of smaller batches, where no setting fits

Report = planning.Report


def settings_of(config: ConfigDict) -> dict[str, Any]:
    """Returns the fields that a search sets, and the batch, by name."""
    return {field: get(config, field) for field in (*FIELDS, "global_batch_size")}


def search(config: ConfigDict, place: topology.Topology, data: Data, first: Report) -> Iterator[Report]:
    """Yields `first`, then a report for each other setting that it compiles, with its `settings`.

    Where none fits, smaller batches of the setting that needs least memory follow.

    Args:
      config: of the training; mesh.tensor and all other fields stay.
      place: the devices.
      data: of the config.
      first: the report of `config` itself.
    """
    given = config.copy_and_resolve_references()
    given.mesh.update(first["mesh"])
    given.model.remat = first["remat"]
    yield first | {"settings": settings_of(given)}
    tried = [(first, given)]
    settings = list(_settings(given, place, data))
    smallest = min((least for least, _ in settings), default=0.0) or 1.0

    def rank(entry: tuple[float, ConfigDict]) -> tuple[int, bool]:
        # Of those that theory cannot tell apart, within a twentieth, the ones of the given mesh come first.
        return int(20 * entry[0] / smallest), entry[1].mesh.to_dict() != given.mesh.to_dict()

    for least, changed in sorted(settings, key=rank):
        if len(tried) > COMPILATIONS:
            break
        if least >= _fastest(tried) or settings_of(changed) == settings_of(given):
            continue
        report = planning.examine(changed, place, data)
        tried.append((report, changed))
        yield report | {"settings": settings_of(changed)}
    if not any(report["fits"] for report, _ in tried):
        report, changed = min(tried, key=lambda entry: entry[0]["memory"]["total"])
        yield from _smaller_batches(changed, place, data, report)


def best(found: list[Report]) -> Report | None:
    """Returns the fastest report that fits, of several the first; None if none does."""
    fitting = [report for report in found if report["fits"]]
    return min(fitting, key=_step_secs, default=None)


def _step_secs(report: Report) -> float:
    return report["step_secs"] or 0.0  # no better one is looked for where times are unknown


def _fastest(tried: list[tuple[Report, ConfigDict]]) -> float:
    return min((_step_secs(report) for report, _ in tried if report["fits"]), default=math.inf)


def _settings(config: ConfigDict, place: topology.Topology, data: Data) -> Iterator[tuple[float, ConfigDict]]:
    """Yields (least seconds of a step, config) for every setting; of equal ones the simplest comes first."""
    for on_mesh in planning.meshes(config, place):
        if on_mesh.mesh.tensor != config.mesh.tensor:
            continue
        # On other meshes the compiler sums gradients in the type of matmuls anyhow.
        is_data_parallel = on_mesh.mesh.fsdp == on_mesh.mesh.tensor == 1
        exchanges = ("float32", "bfloat16") if is_data_parallel else (config.optim.grad_exchange,)
        for shard_state, exchange in itertools.product((False, True), exchanges):
            changed = on_mesh.copy_and_resolve_references()
            changed.optim.update(shard_state=shard_state, grad_exchange=exchange)
            changed.model.remat = "none"
            row = planning.foresee(changed, place, data)
            if row is None or not row["fits"] or (shard_state and on_mesh.mesh.data == 1):
                continue
            hbm = 2 * row["state_bytes"] / place.chip.hbm_bytes_per_sec if place.chip else 0.0
            for remat, passes in row["recomputed"].items():
                secs = {part: value or 0.0 for part, value in row["secs"].items()}
                secs["compute"] *= passes
                changed = changed.copy_and_resolve_references()
                changed.model.remat = remat
                yield max(hbm, *secs.values()), changed


def _smaller_batches(config: ConfigDict, place: topology.Topology, data: Data, report: Report) -> Iterator[Report]:
    """Compiles smaller batches up to the first that fits; what one needs decides which is compiled next."""
    for _ in range(_BATCH_COMPILATIONS):
        batch = _smaller_batch(report)
        if not batch:
            return
        config = config.copy_and_resolve_references()
        config.global_batch_size = batch
        try:
            report = planning.examine(config, place, data)
        except errors.ConfigError:
            return  # so small a batch does not divide over the mesh
        yield report | {"settings": settings_of(config)}
        if report["fits"]:
            return


def _smaller_batch(report: Report) -> int:
    """Returns the largest half, quarter, … of a batch that should fit if memory grows with it; 0 if no image does."""
    memory, batch = report["memory"], report["global_batch_size"]
    growing = memory["temporaries"] + memory["batch"]
    room = (memory["chip"] or math.inf) - (memory["total"] - growing)
    smaller = batch // 2
    while smaller and growing * smaller / batch > room:
        smaller //= 2
    return smaller
