"""Splits a CPU's cores into devices at the start of a command, before JAX makes its CPU client."""

import json
import os
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from mae_dist import errors
from mae_dist.cpu import cores


def use_cores(
    config: ConfigDict,
    workdir: str | None,
    *,
    single_process: bool = True,
    split: Callable[[int, tuple[tuple[int, int], ...]], int] = cores.split_cores,
) -> None:
    """On a CPU splits the cores into devices, as the run in `workdir` did before or as `config.cpu` says.

    A run that continues keeps its choices, for results depend on them in the last bits. `split` does it, and returns
    the number of devices, 0 where it does nothing.
    """
    from mae_dist import config as config_lib

    if (workdir and "://" in workdir) or not (single_process and _may_split_cores(config)):
        return
    with config.unlocked():
        stored = _stored_choices(workdir) if workdir else {}
        if not config.cpu.devices and 0 < stored.get("devices", 0) <= cores.num_cores():
            config.cpu.update(devices=stored["devices"], pieces=config.cpu.pieces or stored.get("pieces", 0))
        if config.cpu.products == "auto":
            config.cpu.products = stored.get("products", "auto")
        config.cpu.fold = config.cpu.fold and stored.get("fold", True)
        share_of_update = config_lib.rows_together(config) * max(1, config.cpu.pieces)
        batches = (
            (config.global_batch_size // config.accum_steps, share_of_update),
            (config.eval.batch_size or config.global_batch_size, 1),
        )
        if config.cpu.devices > cores.num_cores():
            raise errors.ConfigError(
                f"cpu.devices={config.cpu.devices} and this process may use {cores.num_cores()} cores: devices on "
                "one core wait for each other; choose 0 (one per core) or fewer"
            )
        wanted = config.cpu.devices if config.mesh.data == -1 else config.mesh.data
        if wanted <= cores.num_cores():  # of a larger mesh the check of the mesh tells
            config.cpu.devices = split(wanted, batches)


def use_cores_if_free(config: ConfigDict, workdir: str | None) -> None:
    """As `use_cores`, within a program that may have used JAX before: devices that JAX has already stay as they are.

    It sets JAX's own option and no variable of the environment, which would reach the program's other processes.
    """
    import jax

    given = jax.config.jax_num_cpu_devices  # pyright: ignore
    try:  # refused, whatever the value, once JAX has its devices
        jax.config.update("jax_num_cpu_devices", given)
    except RuntimeError:
        return
    if given >= 0:  # whoever set it knows better
        return

    def split(wanted: int, batches: tuple[tuple[int, int], ...]) -> int:
        count = cores.num_devices(wanted, batches)
        if count:
            jax.config.update("jax_num_cpu_devices", count)
        return count

    use_cores(config, workdir, single_process=not jax.distributed.is_initialized(), split=split)


def use_all_cores(config: ConfigDict | None, *, single_process: bool = True) -> None:
    """On a CPU makes each core a device, for commands to which any number will do; a mesh given goes first."""
    if single_process and _may_split_cores(config):
        cores.split_cores(cores.num_cores() if config is None or config.mesh.data == -1 else config.mesh.data, ())


def _may_split_cores(config: ConfigDict | None) -> bool:
    """True if each device holds a whole model."""
    return config is None or config.mesh.fsdp == config.mesh.tensor == 1


def _stored_choices(workdir: str) -> dict[str, Any]:
    try:
        with open(os.path.join(workdir, "config.json"), encoding="utf-8") as file:
            return dict(json.load(file)["cpu"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # no run there yet, or one whose damage is told later
