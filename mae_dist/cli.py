"""The flags that commands share, and the wrapper that runs a command."""

import atexit
import contextlib
import multiprocessing
import os
import re
import signal
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from mae_dist import console, errors, hardware
from mae_dist.config import named

if TYPE_CHECKING:
    from etils import epath

    from mae_dist.resilience.preemption import PreemptionSignals
    from mae_dist.resilience.watchdog import Watchdog

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The config: a name, as cifar_small, or a file.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "The directory of the run (default runs/<config.name>); may be gs://….")
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "host:port of process 0, for several processes.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "The number of processes.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "The number of this process, from 0.")


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line; a fault in it, in the config's file or in an override raises a `ConfigError`."""
    console.check_arguments(argv)
    argv = with_config_path(argv)
    try:
        rest = flags.FLAGS(list(argv))
        if CONFIG.value is not None:
            getattr(CONFIG.value, "name", None)  # a missing file is an error only when it is first read
    except (Exception, SystemExit) as error:
        raise errors.ConfigError(_fault_in_config(error) or _fault_on_command_line(error)) from error
    if CONFIG.value is not None:
        _check_fields(CONFIG.value)
    return rest


def with_config_path(argv: Sequence[str]) -> list[str]:
    """Replaces the name of a config that comes with the package by the path of its file."""
    found = list(argv)
    for place, argument in enumerate(argv[1:], start=1):
        flag = re.match(r"--?config=", argument)
        if flag or argv[place - 1] in ("--config", "-config"):
            start = flag.end() if flag else 0
            value = argument[start:]
            name, colon, rest = value.partition(":")
            if name.isidentifier() and not os.path.exists(value):
                found[place] = f"{argument[:start]}{named.path(name)}{colon}{rest}"
    return found


def _fault_on_command_line(error: BaseException) -> str:
    if isinstance(error, AttributeError) and error.name == "get_config":
        return f"{getattr(error.obj, '__file__', 'the config')} has no function get_config"
    if isinstance(error, AttributeError | KeyError):
        return f"the config has no such field: {_said(error)}"
    return f"{error}".strip()


def _said(error: BaseException) -> object:
    """Returns the message of an exception; ConfigDict puts it into a KeyError inside an AttributeError."""
    while isinstance(error, AttributeError | KeyError) and error.args:
        error = error.args[0]
    return error.msg if isinstance(error, SyntaxError) else error


def _fault_in_config(error: BaseException | None) -> str:
    """Returns the lines of the user's files that raised `error` or its cause, "" if none did."""
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
    """True if a source file belongs neither to Python, nor to a library, nor to this package."""
    libraries = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return not file.startswith(("<", os.path.dirname(os.path.abspath(__file__)), *libraries))


def _check_fields(config: object) -> None:
    """Raises a `ConfigError` if --config has fields that do not exist, or lacks some."""
    from mae_dist import config as config_lib

    if not isinstance(config, ConfigDict):
        raise errors.ConfigError(f"{_config_file()}: get_config() returns {config!r}; it must be a ConfigDict")
    faults = config_lib.field_faults(config)
    if faults:
        lines = [f"{fault} ({_line_with(field)})" for field, fault in faults.items()]
        raise errors.ConfigError("the fields are not those of configs/default.py:\n  - " + "\n  - ".join(lines))


def _config_file() -> str:
    return config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]


def _line_with(words: str) -> str:
    """Returns the config's file, with its last line that has the last of these words."""
    word = re.compile(rf"\b{re.escape(words.rpartition('.')[2])}\b")
    with open(_config_file(), encoding="utf-8", errors="replace") as file:
        numbers = [number for number, line in enumerate(file, start=1) if word.search(line)]
    return f"{_config_file()}, line {numbers[-1]}" if numbers else _config_file()


def join_processes(watchdog: "Watchdog | None" = None, preemption: "PreemptionSignals | None" = None) -> None:
    """Joins the processes of one command by the flags or the cluster's variables, before any device is used.

    A training's `Watchdog` and `PreemptionSignals` join them too.
    """
    from mae_dist.parallel import processes

    if watchdog is None or preemption is None:
        _initialize()
        processes.quiet_unless_primary()
    else:
        import jax

        watchdog.expect_peers(lambda: processes.coordination()[1])
        with watchdog.during("join"):
            _initialize(**watchdog.join_options())
            client, _ = processes.coordination()
            processes.quiet_unless_primary()
        watchdog.join(client, jax.process_index(), jax.process_count())
        preemption.join(client, jax.process_index(), jax.process_count())


def _initialize(**options: float) -> None:
    from mae_dist.parallel import processes

    try:
        processes.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, **options)
    except processes.DevicesInUse as error:
        if CONFIG.value is None:
            raise
        raise errors.ConfigError(
            f"{_line_with('jax')}: the config, or what it imports, has used JAX's devices (jax.device_count(), "
            "jax.devices(), an array): they are not known yet when it is read, for the processes have not joined and "
            "a CPU's cores are not split. Write the number down; mesh.data=-1 takes whatever devices there are"
        ) from error


def is_single_process() -> bool:
    """True unless the flags say that this is one of several processes."""
    return _COORDINATOR.value is None


def required(flag: flags.FlagHolder[Any]) -> str:
    """Returns the value of a flag; raises a `ConfigError` if it is missing."""
    if not flag.value:
        raise errors.ConfigError(f"--{flag.name} is missing: {flags.FLAGS[flag.name].help}")
    return flag.value


def refuse_arguments(argv: Sequence[str]) -> None:
    """Raises a `ConfigError` for words that belong to no flag, as those of a glob that a shell wrote out."""
    if len(argv) > 1:
        raise errors.ConfigError(
            f"{argv[1]!r} belongs to no flag; if it comes of a glob or a list, put that in quotes, with commas between "
            "several: 'photos/*.jpg,more'"
        )


def new_local_path(value: str) -> "epath.Path":
    """Returns --out as a path; raises a `ConfigError` for a bucket, or if it exists already."""
    from mae_dist import storage

    path = storage.local(value, "--out", "write to a local path and copy the result to the bucket")
    if path.exists():
        raise errors.ConfigError(f"--out={path} exists already; remove it or choose another")
    return path


def given_config() -> ConfigDict | None:
    """Returns the config of --config, if it is given."""
    return CONFIG.value


def needed_config() -> ConfigDict:
    """Returns the config of --config, validated."""
    if CONFIG.value is None:
        raise errors.ConfigError("--config is missing: for example --config configs/smoke.py (seconds, no download)")

    from mae_dist import config as config_lib

    config_lib.validate(CONFIG.value)
    return CONFIG.value


def run(entry: Callable[[Sequence[str]], int]) -> None:
    """Runs a command: a fault of the user is one message and its exit code, anything else a traceback and code 1."""
    if "--help" in sys.argv[1:]:
        sys.exit(errors.exit_code_of(_show_help))
    is_done = threading.Event()
    atexit.register(_end, is_done)  # here, before JAX and others register theirs, which run first for that
    # It asks a training for a trace of its steps; before and after them it would kill.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    errors.open_closed_streams()
    console.set_up()
    hardware.keep_libtpu_from_starting()
    try:
        code = errors.exit_code_of(lambda: entry(parse_flags(sys.argv)))
    except Exception as error:
        errors.say("".join(traceback.format_exception(error)).rstrip())
        code = errors.EXIT_INTERNAL
    if code == errors.EXIT_DONE:
        is_done.set()
        return
    # Not by sys.exit: one of several processes must not wait for the others, which wait for it; and a compilation under
    # way does not survive the interpreter.
    os._exit(code)


def _end(is_done: threading.Event) -> None:
    """Ends a process that has done its work at once, as the last of the exit functions.

    Otherwise Python would take its interpreter down, which a thread that compiles, or waits for other processes, within
    XLA does not survive: when it wakes up it aborts the process, after all was well.
    """
    if not is_done.is_set():
        return
    if "jax" in sys.modules:  # imported first: its own exit function comes after this one
        sys.modules["jax"].distributed.shutdown()
    for child in multiprocessing.active_children():
        child.terminate()
    with contextlib.suppress(OSError):  # Python then says itself that its output is lost
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(errors.EXIT_DONE)


def exit_on_signal() -> None:
    """Makes SIGTERM and SIGHUP end this process as preempted while `PreemptionSignals` does not handle them.

    Before that there is nothing to save, and afterwards all is saved: a second signal must not change the code.
    """

    def end(number: int, frame: object) -> None:
        del frame
        errors.say(f"preempted ({signal.Signals(number).name}): nothing is left to save")
        os._exit(errors.EXIT_PREEMPTED)

    signal.signal(signal.SIGTERM, end)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, end)


def _show_help() -> int:
    print(sys.modules["__main__"].__doc__, flags.FLAGS.main_module_help(), sep="\n")
    return errors.EXIT_DONE
