"""Trains in a workdir: `mae_dist.train`, and the part of the command `mae_dist.main` that it shares.

The command adds what only a process of its own may do: flags, signal handlers, the watchdog, exit codes.
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from mae_dist import config as config_lib
from mae_dist import errors, names, readable, storage
from mae_dist.checkpoint import reader
from mae_dist.cpu.start import use_cores
from mae_dist.data.check import check
from mae_dist.data.from_config import Data, open_data
from mae_dist.metrics.recorder import OnRecord
from mae_dist.parallel import processes
from mae_dist.resilience.preemption import Preempted, PreemptionSignals
from mae_dist.resilience.watchdog import Watchdog
from mae_dist.training import job, loop, saved_program
from mae_dist.training.run import name_bad_files
from mae_dist.training.summary import Result
from mae_dist.weights import hub


def train(config: ConfigDict, workdir: str | os.PathLike[str], *, on_record: OnRecord | None = None) -> Result:
    """Trains what `config` describes, continuing what is in `workdir`; returns at once where that is finished.

    For programs and notebooks: it reads no flags, never ends the process, and leaves the process's signal handlers,
    logging, warnings and garbage collection alone. `config.deadlines` are for the command and have no effect here.
    Any thread may call it, and as often as it likes. In the main thread Ctrl-C raises `KeyboardInterrupt` after the
    current step, pressed again at once; the next call continues from the last checkpoint.

    It computes on the devices that JAX has, those of all processes if `jax.distributed.initialize` has joined several
    (then all of them call it). If JAX has not looked for its devices yet and finds only a CPU, the cores become devices
    as in the command: so a first call is faster before anything else was computed.

    Args:
      config: as `mae_dist.get_config` or `mae_dist.default_config` returns it, changed to taste; it is copied.
      workdir: where the run lives, made if it does not exist; may be `gs://…`.
      on_record: called with each record of metrics.jsonl once it is written, every `config.log_every_steps` steps and
        after every evaluation: a dict of `step` and what was measured there, as `loss` or `val_loss`. It runs between
        two steps, in the calling thread, on process 0; what it raises ends the training as a fault does.

    Returns:
      The step reached and the last metrics.

    Raises:
      ConfigError: fields that do not exist or values that cannot work.
      DataFault: the data is missing or an example cannot be read.
      StorageFault: the workdir cannot be used, is in use, or holds a run of another configuration.
      Diverged: `config.max_skipped_steps` steps in a row had a non-finite gradient.
    """
    config = _checked(config)
    name = storage.absolute_name(workdir)
    storage.check_checkpoints(name, saving=True)
    use_cores(config, name)
    with warnings.catch_warnings():
        return run(config, name, Watchdog(**config.deadlines), PreemptionSignals(), on_record=on_record)


def build(config: ConfigDict, devices: Sequence[Any] | None = None) -> job.Job:
    """Opens the data of `config` and wires its training, for a loop of one's own:

        job = mae_dist.build(mae_dist.get_config("smoke"))
        state = job.init_state()
        for batch in job.batches():
            state, metrics = job.train_step(state, batch)
            print(metrics["loss"])

    Its losses are those of `mae_dist.train`, bit for bit on the same devices. What a config says of evaluation,
    logging and checkpoints is left to the caller.

    Args:
      config: as for `mae_dist.train`.
      devices: the devices to use, default all that JAX has.

    Raises:
      ConfigError: fields or values that cannot work, or not on these devices.
      DataFault: the data is missing.
    """
    config = _checked(config)
    if devices is None:
        use_cores(config, None)
        devices = jax.devices()
    return _build(config, devices)


def _build(
    config: ConfigDict, devices: Sequence[Any], when_opened: Callable[[Data], None] = lambda data: None
) -> job.Job:
    job.check_mesh(config, len(devices))  # before any data is fetched
    data = open_data(config)
    when_opened(data)
    return job.build(config, devices, data)


def run(
    config: ConfigDict,
    workdir: str,
    watchdog: Watchdog,
    preemption: PreemptionSignals,
    *,
    when_built: Callable[[], None] = lambda: None,
    profile_on_signal: bool = False,
    check_images: bool = False,
    on_record: OnRecord | None = None,
    verbose: bool = False,
) -> Result:
    """Builds what `config` describes for all of JAX's devices and trains it.

    Args:
      config: checked.
      workdir: an absolute path or `gs://…`.
      watchdog, preemption, profile_on_signal, on_record, verbose: as for `loop.train`.
      when_built: called after building and before training.

    Raises:
      UserError: as `train`.
    """
    try:
        with preemption.interrupting():
            path = storage.absolute(workdir)
            logging.info("%s: %s in %s", config.name, config.task, readable.path(path))
            saved_program.check_exists(config)
            config = _as_begun(config, path)
            checked = functools.partial(_check_images, path, config.data.max_bad_share, watchdog)
            built = _build(config, jax.devices(), checked if check_images else lambda data: None)
        when_built()
        options = {"profile_on_signal": profile_on_signal, "on_record": on_record, "verbose": verbose}
        return loop.train(built, path, watchdog, preemption, **options)
    except Preempted:
        logging.warning("Preempted before there was anything to save; the same command begins or continues.")
        return Result(0, "preempted")
    except Exception as error:
        if _may_be_a_broken_connection(error):  # then the lost peer is what to report
            watchdog.end_if_peers_are_gone()
        raise


def _check_images(workdir: epath.Path, max_bad_share: float, watchdog: Watchdog, data: Data) -> None:
    """Names the images that do not decode, in the log and in bad_files.txt; the first process does it for all."""
    if not processes.is_primary():
        return
    for name, dataset in (("train", data.train), ("val", data.val), ("test", data.test)):
        if dataset is None:
            continue
        found = check(dataset, f"checking {name}", watchdog.progress)
        lines = [*dataset.bad_records, *found.bad]
        for line in lines:
            logging.warning("%s: does not decode: %s", name, line)
        for line in found.warned:
            logging.warning("%s: decoded with warnings: %s", name, line)
        logging.info(
            "%s: %d images, %d do not decode, %d decoded with warnings",
            *(name, dataset.num_examples, len(lines), len(found.warned)),
        )
        with storage.storage_errors(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
        name_bad_files(workdir, lines)
        if len(found.bad) > max_bad_share * dataset.total_examples:
            raise errors.DataFault(
                f"{len(found.bad)} of {dataset.num_examples} {name} images do not decode, and data.max_bad_share is "
                f"{max_bad_share:g}: {', '.join(found.bad[:10])}; restore or remove the files, or raise "
                "data.max_bad_share to skip them"
            )


def _as_begun(config: ConfigDict, workdir: epath.Path) -> ConfigDict:
    """Returns a config with what its run found out at its first start: mean and deviation, the commit of weights."""
    of_hub = config.init_from.startswith(names.HUB)
    if config.data.mean and not of_hub:
        return config
    stored = config
    if (workdir / "config.json").exists():
        with contextlib.suppress(errors.StorageFault):  # reported where the run continues
            stored = reader.read_config(workdir)
    config = config.copy_and_resolve_references().unlock()
    if not config.data.mean:
        config.data.update(mean=stored.data.mean, std=stored.data.std)
    if of_hub and stored.init_from == config.init_from:
        config.init_commit = config.init_commit or stored.init_commit
    if of_hub and not config.init_commit:  # one commit for all processes, even if the revision moves meanwhile
        secs = config.deadlines.start_secs or 86400.0
        key = f"init_commit/{workdir}/{config.init_from}"
        config.init_commit = processes.from_first(key, lambda: hub.download(config.init_from).commit, secs)
    return config.lock()


def _may_be_a_broken_connection(error: BaseException | None) -> bool:
    """True if neither the system nor we raised it: JAX has several exception types for a failed collective."""
    while error is not None:
        if not isinstance(error, errors.UserError | OSError):
            return True
        error = error.__cause__ or error.__context__
    return False


def keep_compilations(workdir: str) -> None:
    """Keeps compiled programs in `.compiled` beside a local workdir, for the next start of this or a like run.

    Compiled programs are code, so a directory that others own or may write to is not used. `JAX_COMPILATION_CACHE_DIR`
    names another place, also in a bucket; `JAX_ENABLE_COMPILATION_CACHE=false` turns the cache off.
    """
    if "://" in workdir or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    directory = os.path.join(os.path.dirname(workdir), ".compiled")
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        found = os.stat(directory)
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            logging.warning("%s belongs to others or is open to them: compiled programs are not kept", directory)
            return
    except OSError as error:  # the run itself tells what cannot be written
        logging.warning("Compiled programs are not kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _checked(config: ConfigDict) -> ConfigDict:
    """Returns a copy of a config that a caller gives, after all checks that need no device."""
    if not isinstance(config, ConfigDict):
        raise errors.ConfigError(
            f"the config is of type {type(config).__name__}; give what mae_dist.get_config returns"
        )
    config = ConfigDict(config.to_dict())
    faults = config_lib.field_faults(config)
    if faults:
        lines = "\n  - ".join(faults.values())
        raise errors.ConfigError(f"the config is not as mae_dist.default_config() has it:\n  - {lines}")
    config_lib.validate(config)
    return config.lock()
