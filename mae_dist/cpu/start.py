"""Splits a CPU's cores into devices, by JAX's own option, before JAX makes its CPU client."""

import json
import os
from typing import Any

import jax
from ml_collections import ConfigDict

from mae_dist import config as config_lib
from mae_dist import errors
from mae_dist.cpu import cores

_BY_JAX = -1  # the default of jax_num_cpu_devices: one device, or as many as XLA_FLAGS say


def use_cores(config: ConfigDict, workdir: str | None, *, single_process: bool = True) -> None:
    """Splits a CPU's cores into devices, as `choose_devices` says.

    Does nothing if JAX has its devices already, or if the number of devices was set by hand.

    Args:
      config: validated; its `cpu` fields are filled in.
      workdir: where the run may have been before; None for nowhere.
      single_process: False if this is one of several processes that have yet to join.
    """
    if single_process and _may_split_cores(config) and not (workdir and "://" in workdir):
        jax.config.update("jax_num_cpu_devices", choose_devices(config, workdir) or _BY_JAX)


def choose_devices(config: ConfigDict, workdir: str | None) -> int:
    """Fills in the fields of `config.cpu` as the run in `workdir` had them; returns the number of devices, 0 for JAX's.

    A run that continues keeps its choices, for results depend on them in the last bits.
    """
    with config.unlocked():
        stored = _stored_choices(workdir) if workdir else {}
        if not config.cpu.devices and 0 < stored.get("devices", 0) <= cores.num_cores():
            config.cpu.update(devices=stored["devices"], pieces=config.cpu.pieces or stored.get("pieces", 0))
        if config.cpu.products == "auto":
            config.cpu.products = stored.get("products", "auto")
        config.cpu.fold = config.cpu.fold and stored.get("fold", True)
        share_of_update = config_lib.rows_together(config) * max(1, config.cpu.pieces)
        batches = (
            (config.global_batch_size // max(1, config.accum_steps), share_of_update),
            (config.eval.batch_size or config.global_batch_size, 1),
        )
        if config.cpu.devices > cores.num_cores():
            raise errors.ConfigError(
                f"cpu.devices={config.cpu.devices} and this process may use {cores.num_cores()} cores: devices on "
                "one core wait for each other; choose 0 (one per core) or fewer"
            )
        wanted = config.cpu.devices if config.mesh.data == -1 else config.mesh.data
        if wanted > cores.num_cores():  # a larger mesh is refused where meshes are checked
            return 0
        config.cpu.devices = cores.num_devices(wanted, batches)
        return config.cpu.devices


def use_all_cores(config: ConfigDict | None, *, single_process: bool = True) -> None:
    """Makes each core of a CPU a device, for commands that work with any number; a config's mesh goes first."""
    if single_process and _may_split_cores(config):
        wanted = cores.num_cores() if config is None or config.mesh.data == -1 else config.mesh.data
        jax.config.update("jax_num_cpu_devices", cores.num_devices(wanted, ()) or _BY_JAX)


def _may_split_cores(config: ConfigDict | None) -> bool:
    """True if each device holds a whole model, JAX has no devices yet, and nobody has set their number."""
    if jax.distributed.is_initialized() or (config is not None and not config.mesh.fsdp == config.mesh.tensor == 1):
        return False
    given = jax.config.jax_num_cpu_devices  # pyright: ignore
    try:  # another value is refused once JAX has its devices
        jax.config.update("jax_num_cpu_devices", given + 2)
        jax.config.update("jax_num_cpu_devices", given)
    except RuntimeError:
        return False
    return given == _BY_JAX


def _stored_choices(workdir: str) -> dict[str, Any]:
    try:
        with open(os.path.join(workdir, "config.json"), encoding="utf-8") as file:
            return dict(json.load(file)["cpu"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # no run there yet, or one whose corruption is reported later
