"""Trains what a config describes: `python -m mae_dist.main --config configs/cifar_medium.py [--config.a.b=value …]`.

The same command again continues the run in its workdir. Exit codes: `mae_dist/errors.py`.
"""

import gc
import sys
from collections.abc import Sequence

from absl import flags

from mae_dist import cli, console, errors
from mae_dist.cli import WORKDIR, exit_on_signal, is_single_process, join_processes, needed_config, run

flags.adopt_module_key_flags(cli)  # --help shows them too
_METADATA_SERVER = flags.DEFINE_string(
    "metadata_server",
    None,
    "host[:port] to ask for preemption signals, '': none (default: $GCE_METADATA_HOST, or Google's on its machines).",
)
_SIMULATE_PREEMPTION = flags.DEFINE_integer(
    "simulate_preemption_at_step", 0, "Get a preemption signal after this step, to see what happens."
)
_CHECK = flags.DEFINE_bool("check", False, "Decodes every image first, and names those that do not decode.")
_VERBOSE = flags.DEFINE_bool(
    "verbose", False, "Also logs the table of parameters (overview.txt), and each message with its thread and source."
)


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    if len(argv) > 1:
        raise errors.ConfigError(f"unexpected arguments {argv[1:]}; options are --config.field=value")
    config = needed_config()
    if _VERBOSE.value:
        console.show_sources()

    from mae_dist import storage
    from mae_dist.cpu.start import use_cores
    from mae_dist.resilience.preemption import PreemptionSignals
    from mae_dist.resilience.watchdog import Watchdog

    workdir = storage.absolute_name(WORKDIR.value or f"runs/{config.name}")
    storage.check_checkpoints(workdir, saving=True)
    use_cores(config, workdir, single_process=is_single_process())

    preemption = PreemptionSignals(_SIMULATE_PREEMPTION.value)
    with Watchdog(**config.deadlines) as watchdog, preemption.handling(_METADATA_SERVER.value):
        from mae_dist.parallel import processes
        from mae_dist.training import session, text

        join_processes(watchdog, preemption)
        session.keep_compilations(workdir)
        result = session.run(
            config,
            workdir,
            watchdog,
            preemption,
            when_built=_start_collecting_garbage,
            profile_on_signal=True,
            check_images=_CHECK.value,
            verbose=_VERBOSE.value,
        )
        if result.status == "preempted":
            return errors.EXIT_PREEMPTED
        if processes.is_primary():
            print(text.result_text(config, result, workdir, console.width(sys.stdout)), flush=True)
        return errors.EXIT_DONE


def _start_collecting_garbage() -> None:
    gc.freeze()
    gc.enable()


if __name__ == "__main__":
    gc.disable()  # imports and set-up make no garbage, and looking for it takes a fifth of their time
    exit_on_signal()
    run(main)
