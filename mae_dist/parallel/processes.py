"""Start-up of one or many processes, and what only the first of them does."""

import logging
import math
import os
import socket
from collections.abc import Callable
from typing import Any

import jax

from mae_dist import console
from mae_dist.errors import ConfigError

# Environment variables of Slurm's steps, Open MPI, and TPU pods.
_SET_BY_LAUNCHERS = ("SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri", "TPU_WORKER_HOSTNAMES", "MEGASCALE_SLICE_ID")


def initialize(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    join_secs: float = 300,
    heartbeat_secs: float = 100,
) -> None:
    """Joins the processes of one run, before any device is touched.

    With explicit arguments they are used as given (all three are needed). Without, JAX looks whether this is a TPU
    pod, a Slurm or an Open MPI job; anything else is a run of one process.

    Args:
      coordinator_address: host:port of process 0.
      num_processes: of the run.
      process_id: which of them this one is.
      join_secs: JAX aborts this process when not all have come by then.
      heartbeat_secs: JAX aborts all processes when one has been silent for so long.

    Raises:
      ConfigError: arguments that cannot work, or a cluster that cannot be joined.
      DevicesInUse: JAX's devices were used already.
    """
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM: see `preemption`
    secs: dict[str, Any] = {
        "initialization_timeout": math.ceil(join_secs),
        "heartbeat_timeout_seconds": math.ceil(heartbeat_secs),
    }
    given = (coordinator_address, num_processes, process_id)
    if all(value is None for value in given):
        try:
            _join(secs)
        except ValueError as error:
            # JAX raises it where it finds no cluster.
            if _is_in_cluster() and "coordinator_address should be defined" not in str(error):
                raise ConfigError(
                    f"the cluster this process seems to be in cannot be joined: {error}; give "
                    "--coordinator_address, --num_processes and --process_id"
                ) from error
        return
    flags = f"--coordinator_address={coordinator_address} --num_processes={num_processes} --process_id={process_id}"
    if coordinator_address is None or num_processes is None or process_id is None:
        raise ConfigError(f"{flags}: give all three (the address is host:port of process 0), or none")
    port = coordinator_address.rpartition(":")[2]
    if not 0 <= process_id < num_processes or not port.isdigit():
        raise ConfigError(f"{flags}: the address is host:port, and process ids are 0 to num_processes - 1")
    if process_id == 0:
        try:
            socket.create_server(("", int(port))).close()
        except (OSError, OverflowError) as error:  # JAX would die of it by a signal
            raise ConfigError(
                f"--coordinator_address={coordinator_address}: port {port} cannot be used: {error}"
            ) from error
    _join(secs, coordinator_address, num_processes, process_id)


def _is_in_cluster() -> bool:
    """True if a launcher of several processes, of those that JAX knows, seems to have started this one."""
    return any(name in os.environ for name in _SET_BY_LAUNCHERS)


def _join(secs: dict[str, Any], *where: Any) -> None:
    try:
        jax.distributed.initialize(*where, **secs)
    except RuntimeError as error:
        if (where or _is_in_cluster()) and "before any JAX calls" not in str(error):
            raise
        raise DevicesInUse(str(error)) from error


class DevicesInUse(RuntimeError):
    """JAX has looked for its devices before the processes have joined."""


def coordination() -> tuple[Any, str]:
    """Returns (client, host:port of process 0) of JAX's coordination service; (None, "") where nothing was joined.

    There is no public way to it; `preemption` and `watchdog` need a place where processes leave messages for each
    other. A single process does not ask.

    Raises:
      ConfigError: several processes, and a version of JAX that keeps the client elsewhere.
    """
    if not jax.distributed.is_initialized():
        return None, ""
    try:
        from jax._src import distributed as internal

        return internal.global_state.client, internal.global_state.coordinator_address or ""
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"several processes cannot exchange messages with jax {jax.__version__} ({error}); install a version that "
            "pyproject.toml names"
        ) from error


def send_to_first(key: str, text: str, timeout_secs: float) -> list[str] | None:
    """Returns in process 0 the text of every process, in their order; None in the others, which do not wait for it.

    May be called from any thread: it runs nothing on the devices.

    Args:
      key: that no other use has; the same in all processes.
      text: of this process, at most a few MB.
      timeout_secs: after which process 0 raises a `TimeoutError` for one that has sent nothing.
    """
    count = jax.process_count()
    if count == 1:
        return [text]
    client, _ = coordination()
    if not is_primary():
        client.key_value_set(f"{key}/{jax.process_index()}", text)
        return None
    texts = [text]
    for index in range(1, count):
        try:
            texts.append(client.blocking_key_value_get(f"{key}/{index}", math.ceil(1000 * timeout_secs)))
        except jax.errors.JaxRuntimeError as error:
            raise TimeoutError(f"process {index} has not sent {key} within {timeout_secs:.0f} s") from error
    client.key_value_delete(f"{key}/")
    return texts


def from_first(key: str, make: Callable[[], str], timeout_secs: float) -> str:
    """Returns in every process what `make` returns in process 0, for which the others wait.

    Args:
      key: that no other use has; the same in all processes.
      make: called in process 0 only.
      timeout_secs: after which the others raise a `TimeoutError`.
    """
    if jax.process_count() == 1:
        return make()
    client, _ = coordination()
    if is_primary():
        text = make()
        client.key_value_set(key, text, allow_overwrite=True)
        return text
    try:
        return client.blocking_key_value_get(key, math.ceil(1000 * timeout_secs))
    except jax.errors.JaxRuntimeError as error:
        raise TimeoutError(
            f"process 0 has not sent {key} within {timeout_secs:.0f} s; see its messages, or raise "
            "deadlines.start_secs if it was still downloading"
        ) from error


def is_primary() -> bool:
    """True if this process writes metrics, pictures and log lines."""
    return jax.process_index() == 0


def quiet_unless_primary() -> None:
    """Warnings only from all processes but the first; one process's progress is everyone's. Messages name theirs."""
    # That there is no TPU on a machine without one is no news; said before the first look at the devices.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    console.set_level(logging.INFO if is_primary() else logging.WARNING)
    if jax.process_count() > 1:
        console.name_process(jax.process_index())
