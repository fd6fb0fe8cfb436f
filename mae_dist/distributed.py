"""Start-up of one or many processes, and what only the first of them does."""

import logging as python_logging
import os

import jax
from absl import logging
from jax.experimental import multihost_utils

from mae_dist.errors import ConfigError


def initialize(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the processes of one run, before any device is touched.

    With explicit arguments they are used as given (all three are needed). Without, a TPU pod, Slurm or Open MPI job is
    recognised by its environment and JAX finds the rest; anything else is a run of one process.
    """
    given = (coordinator_address, num_processes, process_id)
    if any(value is not None for value in given):
        if any(value is None for value in given):
            raise ConfigError(
                f"--coordinator_address={coordinator_address} --num_processes={num_processes} "
                f"--process_id={process_id}: give all three (the address is host:port of process 0), or none"
            )
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    elif _in_cluster():
        jax.distributed.initialize()


def _in_cluster() -> bool:
    """Whether the environment names several processes that JAX can join by itself."""
    environ = os.environ
    return (
        int(environ.get("SLURM_NTASKS") or 1) > 1
        or int(environ.get("OMPI_COMM_WORLD_SIZE") or 1) > 1
        or "," in environ.get("TPU_WORKER_HOSTNAMES", "")
        or "MEGASCALE_COORDINATOR_ADDRESS" in environ
    )


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


def barrier(name: str) -> None:
    """Waits for all processes; does nothing for one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
