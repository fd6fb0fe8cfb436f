"""Trains what a config describes: `python -m mae_dist.main --config configs/cifar_medium.py [--config.a.b=value …]`.

The same line again continues the run in its workdir. Exit codes: `mae_dist/errors.py`.
"""

import gc
import json
import os
import re
import signal
import sys
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from mae_dist import console, cpu, errors

_CONFIG = config_flags.DEFINE_config_file("config", None, "What to train: a file of configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives (default runs/<config.name>); may be gs://….")
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "host:port of process 0, for several processes.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which one this is, from 0.")
_METADATA_SERVER = flags.DEFINE_string(
    "metadata_server",
    None,
    "host[:port] to ask for preemption notices, '': none (default: $GCE_METADATA_HOST, or Google's on its machines).",
)
_SIMULATE_PREEMPTION = flags.DEFINE_integer(
    "simulate_preemption_at_step", 0, "Be told after this update that the machine will go, to see what happens."
)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line; what is wrong with it, the config's file or an override of it is a `ConfigError`."""
    console.check_arguments(argv)
    try:
        rest = flags.FLAGS(list(argv))
        if _CONFIG.value is not None:
            getattr(_CONFIG.value, "name", None)  # a file that is not there is an error only when it is first read
    except (Exception, SystemExit) as error:
        raise errors.ConfigError(_fault_in_config(error) or _fault_on_command_line(error)) from error
    if _CONFIG.value is not None:
        _check_fields(_CONFIG.value)
    return rest


def _fault_on_command_line(error: BaseException) -> str:
    if isinstance(error, AttributeError) and error.name == "get_config":
        return f"{getattr(error.obj, '__file__', 'the config')} has no function get_config"
    if isinstance(error, AttributeError | KeyError):
        return f"the config has no such field: {_said(error)}"
    return f"{error}".strip()


def _said(error: BaseException) -> Any:
    """The message of an exception; ConfigDict's is that of a KeyError inside an AttributeError."""
    while isinstance(error, AttributeError | KeyError) and error.args:
        error = error.args[0]
    return error.msg if isinstance(error, SyntaxError) else error


def _fault_in_config(error: BaseException | None) -> str:
    """Names the lines of the user's files that raised `error`, or what it was raised from; "" if none did."""
    found = ""
    while error is not None:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
        lines = [(frame.filename, frame.lineno, frame.line) for frame in frames]
        if isinstance(error, SyntaxError) and error.filename:
            lines.append((error.filename, error.lineno, error.text))
        if lines:
            places = ", from ".join(f"{file}, line {number}" for file, number, _ in reversed(lines))
            found = f"{places}: {type(error).__name__}: {_said(error)}\n    {(lines[-1][2] or '').strip()}"
        error = error.__cause__ or error.__context__
    return found


def _is_users(file: str) -> bool:
    """True if a source file is neither Python's, nor a library's, nor this package's."""
    libraries = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return not file.startswith(("<", os.path.dirname(os.path.abspath(__file__)), *libraries))


def _check_fields(config: Any) -> None:
    """Raises a `ConfigError` if --config gives fields that do not exist, or lacks some."""
    from mae_dist import config as config_lib

    if not isinstance(config, ConfigDict):
        raise errors.ConfigError(f"{_config_file()}: get_config() returns {config!r}; it must be a ConfigDict")
    faults = config_lib.field_faults(config, default_config())
    if faults:
        lines = [f"{fault} ({_line_with(field)})" for field, fault in faults.items()]
        raise errors.ConfigError("the config is not as configs/default.py has it:\n  - " + "\n  - ".join(lines))


def _config_file() -> str:
    return config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]


def _line_with(words: str) -> str:
    """The config's file, and the last line in it that has the last of these words."""
    word = re.compile(rf"\b{re.escape(words.rpartition('.')[2])}\b")
    with open(_config_file(), encoding="utf-8", errors="replace") as file:
        numbers = [number for number, line in enumerate(file, start=1) if word.search(line)]
    return f"{_config_file()}, line {numbers[-1]}" if numbers else _config_file()


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

    from mae_dist import preemption, storage, watch

    workdir_name = storage.absolute_name(_WORKDIR.value or f"runs/{config.name}")
    storage.check_checkpoints(workdir_name, saving=True)
    use_cores(config, workdir_name)

    notices = preemption.Notices(_SIMULATE_PREEMPTION.value)
    with watch.Watch(**config.deadlines) as watching, notices.handling(_METADATA_SERVER.value):
        import jax

        from mae_dist import job, train

        join_processes(watching, notices)
        try:
            with notices.interrupting():
                workdir = storage.absolute(workdir_name)
                keep_compilations(workdir_name)
                kind = jax.devices()[0].device_kind
                logging.info("workdir %s, %d devices of kind %s", workdir, jax.device_count(), kind)
                job.check_mesh(config, jax.device_count())  # before any data is fetched
                built = job.build(config, jax.devices(), job.open_data(config))
            gc.freeze()
            gc.enable()
            return train.train(built, workdir, default_config(), watching, notices)
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


def default_config() -> ConfigDict:
    """configs/default.py: the fields that a stored config may lack."""
    from configs import default

    return default.get_config()


def use_cores(config: ConfigDict, workdir: str) -> None:
    """On a CPU splits the cores into devices, as the run in `workdir` did before or as `config.cpu` says.

    A run that continues keeps its choices, for results depend on them in the last bits.
    """
    from mae_dist import config as config_lib

    if "://" in workdir or not _may_split_cores(config):
        return
    with config.unlocked():
        stored = _stored_choices(workdir)
        if not config.cpu.devices and 0 < stored.get("devices", 0) <= cpu.num_cores():
            config.cpu.update(devices=stored["devices"], pieces=config.cpu.pieces or stored.get("pieces", 0))
        if config.cpu.products == "auto":
            config.cpu.products = stored.get("products", "auto")
        config.cpu.fold = config.cpu.fold and stored.get("fold", True)
        share_of_update = config_lib.rows_together(config) * max(1, config.cpu.pieces)
        batches = (
            (config.global_batch_size // config.accum_steps, share_of_update),
            (config.eval.batch_size or config.global_batch_size, 1),
        )
        if config.cpu.devices > cpu.num_cores():
            raise errors.ConfigError(
                f"cpu.devices={config.cpu.devices} and this process may use {cpu.num_cores()} cores: devices on "
                "one core wait for each other; choose 0 (one per core) or fewer"
            )
        wanted = config.cpu.devices if config.mesh.data == -1 else config.mesh.data
        if wanted <= cpu.num_cores():  # of a larger mesh the check of the mesh tells
            config.cpu.devices = cpu.split_cores(wanted, batches)


def use_all_cores(config: ConfigDict | None) -> None:
    """On a CPU makes each core a device, for commands to which any number will do; a mesh given goes first."""
    if _may_split_cores(config):
        cpu.split_cores(cpu.num_cores() if config is None or config.mesh.data == -1 else config.mesh.data, ())


def _may_split_cores(config: ConfigDict | None) -> bool:
    """Whether this is the only process and the devices hold whole models."""
    return _COORDINATOR.value is None and (config is None or config.mesh.fsdp == config.mesh.tensor == 1)


def _stored_choices(workdir: str) -> dict[str, Any]:
    try:
        with open(os.path.join(workdir, "config.json"), encoding="utf-8") as file:
            return dict(json.load(file)["cpu"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # no run there yet, or one whose damage is told later


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


def join_processes(watching: Any = None, notices: Any = None) -> None:
    """Joins the processes of one command, as the flags or the cluster say, before any device is touched.

    A training's `Watch` and `Notices` join with it.
    """
    from mae_dist import distributed

    if watching is None:
        _initialize()
        distributed.quiet_unless_primary()
    else:
        import jax

        watching.expect_peers(lambda: distributed.coordination()[1])
        with watching.during("join"):
            _initialize(**watching.join_options())
            client, address = distributed.coordination()
            distributed.quiet_unless_primary()
        watching.join(client, address, jax.process_index(), jax.process_count())
        notices.join(client, jax.process_index(), jax.process_count())


def _initialize(**options: float) -> None:
    from mae_dist import distributed

    try:
        distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, **options)
    except distributed.DevicesInUse as error:
        if _CONFIG.value is None:
            raise
        raise errors.ConfigError(
            f"{_line_with('jax')}: the config, or what it imports, has used JAX's devices (jax.device_count(), "
            "jax.devices(), an array): they are not known yet when it is read, for the processes have not joined and "
            "a CPU's cores are not split. Write the number down; mesh.data=-1 takes whatever devices there are"
        ) from error


def required(flag: flags.FlagHolder[Any]) -> str:
    """The value of a flag that a command cannot do without."""
    if not flag.value:
        raise errors.ConfigError(f"--{flag.name} is missing: {flags.FLAGS[flag.name].help}")
    return flag.value


def new_local_path(value: str) -> Any:
    """Where a command shall write what is not there yet; a `ConfigError` for a bucket or something that exists."""
    from mae_dist import storage

    path = storage.local(value, "--out", "write to a local path and copy the result to the bucket")
    if path.exists():
        raise errors.ConfigError(f"--out={path} exists already; remove it or choose another")
    return path


def given_config() -> ConfigDict | None:
    """What --config names, if anything."""
    return _CONFIG.value


def needed_config() -> ConfigDict:
    """What --config names, checked."""
    if _CONFIG.value is None:
        raise errors.ConfigError("--config is missing: for example --config configs/smoke.py (seconds, no download)")

    from mae_dist import config as config_lib

    config_lib.validate(_CONFIG.value)
    return _CONFIG.value


def run(entry: Callable[[Sequence[str]], int]) -> None:
    """Runs a command: faults of the user are one message and their exit code, anything else a traceback and 1."""
    if "--help" in sys.argv[1:]:
        sys.exit(errors.exit_code_of(_show_help))
    if hasattr(signal, "SIGUSR1"):  # asks a training for a trace of its updates; before and after them it would kill
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    cpu.use_huge_pages()
    errors.open_closed_streams()
    logging.set_verbosity(logging.INFO)
    logging.use_absl_handler()
    console.set_up()
    try:
        code = errors.exit_code_of(lambda: entry(parse_flags(sys.argv)))
    except Exception as error:
        errors.say("".join(traceback.format_exception(error)).rstrip())
        code = errors.EXIT_INTERNAL
    if code == errors.EXIT_DONE:
        return
    # Not by sys.exit: of several processes one with a fault must not wait for the others, which wait for it; and a
    # compilation under way does not survive the interpreter.
    os._exit(code)


def end_when_told() -> None:
    """Makes SIGTERM and SIGHUP end this process as preempted, wherever `Notices` does not take them.

    Before it does there is nothing to save, and afterwards all is saved: a second signal must not change the code.
    """

    def end(number: int, frame: Any) -> None:
        del frame
        errors.say(f"preempted ({signal.Signals(number).name}): nothing is left to save")
        os._exit(errors.EXIT_PREEMPTED)

    signal.signal(signal.SIGTERM, end)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, end)


def _show_help() -> int:
    print(sys.modules["__main__"].__doc__, flags.FLAGS.main_module_help(), sep="\n")
    return errors.EXIT_DONE


if __name__ == "__main__":
    end_when_told()
    run(main)
