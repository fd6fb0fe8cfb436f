"""Trains what a config describes: `python -m mae_dist.main --config configs/cifar_medium.py [--config.a.b=value …]`.

The same line again continues the run in its workdir. Exit codes: `mae_dist/errors.py`.
"""

import gc
import os
from collections.abc import Sequence

from absl import flags, logging

from mae_dist import cli, errors
from mae_dist.cli import WORKDIR, end_when_told, is_single_process, join_processes, needed_config, run
from mae_dist.cpu.start import use_cores

flags.adopt_module_key_flags(cli)  # --help shows them too
_METADATA_SERVER = flags.DEFINE_string(
    "metadata_server",
    None,
    "host[:port] to ask for preemption notices, '': none (default: $GCE_METADATA_HOST, or Google's on its machines).",
)
_SIMULATE_PREEMPTION = flags.DEFINE_integer(
    "simulate_preemption_at_step", 0, "Be told after this update that the machine will go, to see what happens."
)


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    gc.disable()  # of what is imported and built nothing is garbage, and looking for it takes a fifth of the time
    try:
        return _train(argv)
    finally:
        gc.enable()


def _train(argv: Sequence[str]) -> int:
    if len(argv) > 1:
        raise errors.ConfigError(f"unexpected arguments {argv[1:]}; options are --config.field=value")
    config = needed_config()

    from mae_dist import storage
    from mae_dist.resilience import preemption, watchdog

    workdir_name = storage.absolute_name(WORKDIR.value or f"runs/{config.name}")
    storage.check_checkpoints(workdir_name, saving=True)
    use_cores(config, workdir_name, single_process=is_single_process())

    notices = preemption.Notices(_SIMULATE_PREEMPTION.value)
    with watchdog.Watch(**config.deadlines) as watching, notices.handling(_METADATA_SERVER.value):
        import jax

        from mae_dist.data.from_config import open_data
        from mae_dist.training import job, loop

        join_processes(watching, notices)
        try:
            with notices.interrupting():
                workdir = storage.absolute(workdir_name)
                keep_compilations(workdir_name)
                kind = jax.devices()[0].device_kind
                logging.info("workdir %s, %d devices of kind %s", workdir, jax.device_count(), kind)
                job.check_mesh(config, jax.device_count())  # before any data is fetched
                built = job.build(config, jax.devices(), open_data(config))
            gc.freeze()
            gc.enable()
            return loop.train(built, workdir, watching, notices)
        except preemption.Preempted:
            logging.warning("Preempted before there was anything to save; the same command begins or continues.")
            return errors.EXIT_PREEMPTED
        except Exception as error:
            if _may_be_a_broken_connection(error):  # then who broke it is the news
                watching.end_if_peers_are_gone()
            raise


def _may_be_a_broken_connection(error: BaseException | None) -> bool:
    """Whether anything but the system and ourselves raised it: JAX has several types for a collective that failed."""
    while error is not None:
        if not isinstance(error, errors.UserError | OSError):
            return True
        error = error.__cause__ or error.__context__
    return False


def keep_compilations(workdir: str) -> None:
    """Compiled programs are kept in `.compiled` beside a local workdir, for the next start of this or a like run.

    They are code: a directory that somebody else owns or may write to is not used. `JAX_COMPILATION_CACHE_DIR` names
    another place, a bucket's too; `JAX_ENABLE_COMPILATION_CACHE=false` turns it off.
    """
    import jax

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


if __name__ == "__main__":
    end_when_told()
    run(main)
