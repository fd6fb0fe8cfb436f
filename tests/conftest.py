"""Eight fake CPU devices for every test, and a clean environment for the processes that tests start."""

import faulthandler
import gc
import mmap
import os
import random
import re
import signal
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import hypothesis
import pytest
from etils import epath

ROOT = Path(__file__).resolve().parent.parent
FAKE_DEVICES = 8
_STDERR = pytest.StashKey[int]()
_LEFT_OUT = pytest.StashKey[int]()


def _xla_knows(flag: str) -> bool:
    """Whether this jaxlib has the XLA flag; XLA aborts the process on a flag that it does not know."""
    spec = find_spec("jaxlib")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    for library in Path(spec.submodule_search_locations[0]).glob("libjax_common.*"):
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            if text.find(b"\0" + flag.encode() + b"\0") >= 0:  # a C string; names of flags that are gone are not
                return True
    return False


def _device_env(devices: int) -> dict[str, str]:
    """Environment variables that give JAX this many CPU devices; they count only before JAX makes its CPU client."""
    env = {"JAX_PLATFORMS": "cpu", "MPLBACKEND": "Agg"}
    # Compiling takes most of the time here, half as long without optimisation and a third of that with the older
    # emitter of fused loops.
    flags = ["--xla_backend_optimization_level=0"]
    older_emitter = "xla_cpu_use_fusion_emitters"
    if _xla_knows(older_emitter):
        flags.append(f"--{older_emitter}=false")
    flags.append(f"--xla_force_host_platform_device_count={devices}")  # one too: else a command makes its own choice
    if devices > 1:
        # A collective that hangs fails the test well before the test's own timeout (XLA's default is 40 s).
        stuck = "xla_cpu_collective_call_terminate_timeout_seconds"
        if _xla_knows(stuck):
            flags.append(f"--{stuck}=20")
    env["XLA_FLAGS"] = " ".join(flags)
    if devices > (os.cpu_count() or 1):
        # XLA sizes its thread pool by the cores, and a collective needs one thread per device: fewer deadlock.
        env["NPROC"] = "32"
    return env


os.environ.update(_device_env(FAKE_DEVICES))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of tests in a shell's background, whose processes inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax  # noqa: E402 (after the environment it reads)
import jaxtyping  # noqa: E402

# Shapes and types of these modules' annotations are checked at every call, that is when JAX traces.
jaxtyping.install_import_hook(("mae_dist.model", "mae_dist.tasks", "mae_dist.training.train_step"), "beartype.beartype")

from tests import NO_PARITY, runs  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--long`."""
    parser.addoption("--long", action="store_true", help="also run the tests marked `long`")


def pytest_configure(config: pytest.Config) -> None:
    """Keeps the standard error output from what captures it during tests; sets how many examples Hypothesis draws."""
    config.stash[_STDERR] = os.dup(2)
    examples = 100 if config.option.long else 25  # a test that sets its own number sets a multiple of this one
    hypothesis.settings.register_profile("ours", deadline=None, max_examples=examples, derandomize="CI" in os.environ)
    hypothesis.settings.load_profile("ours")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests marked `long` unless the command asks for them or names what it runs."""
    named = any(Path(argument.partition("::")[0]).is_file() for argument in config.args)
    if named or config.option.long or config.option.keyword or config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("long")]
    items[:] = [item for item in items if not item.get_closest_marker("long")]
    config.hook.pytest_deselected(items=left_out)
    config.stash[_LEFT_OUT] = len(left_out)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Sends what a worker of pytest-xdist has left out to the process that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(_LEFT_OUT, 0)  # pyright: ignore


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Takes what a worker of pytest-xdist has left out; all leave out the same."""
    node.config.stash[_LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Reports how many tests were left out, and how to run them."""
    if left_out := config.stash.get(_LEFT_OUT, 0):
        terminalreporter.line(
            f"{left_out} long tests were left out: `bash tests/run.sh --long` runs them, too", bold=True
        )


class _WithoutParity(pytest.Module):
    """A module of tests that needs PyTorch, where that is not installed."""

    def collect(self) -> NoReturn:
        pytest.skip(f"{self.path.name}: {NO_PARITY}", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Skips, where the parity extra is not installed, the modules that import it."""
    needs_parity = re.search(r"^(import|from) (torch|transformers)\b", module_path.read_text(), re.MULTILINE)
    if needs_parity and not (find_spec("torch") and find_spec("transformers")):
        return _WithoutParity.from_parent(parent, path=module_path)
    return None


@pytest.hookimpl(trylast=True)
def pytest_exception_interact(node: Any) -> None:
    """Starts the watchdog again, which pytest stops at a failure for the sake of debuggers.

    What a failed test tears down can hang as well, and with it the last test that waits for the same worker.
    """
    secs = float(node.config.getini("faulthandler_timeout") or 0)
    if secs and not node.config.getoption("usepdb"):
        faulthandler.dump_traceback_later(secs, exit=True, file=node.config.stash[_STDERR])


def pytest_collection_finish() -> None:
    """Hides what the imports made from the garbage collector: every `gc.collect` walked it, a quarter of some tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def child_env(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """`child_env(devices=1)`: the environment of a started process that shall see this many CPU devices.

    Nothing of this process's JAX settings is inherited; compiled programs are shared among the children of one session,
    whichever of pytest's workers starts them.
    """
    session = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        session = session.parent  # a worker has a directory of its own in the session's
    compilation_cache = session / "jax_cache"
    compilation_cache.mkdir(exist_ok=True)

    def make(devices: int = 1) -> dict[str, str]:
        ours = ("JAX_", "XLA_", "NPROC", "TPU_", "PYTEST_", "COV_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        env.update(_device_env(devices))
        env["PYTHONPATH"] = str(ROOT)  # so that a child may run in any directory
        env["JAX_COMPILATION_CACHE_DIR"] = str(compilation_cache)
        env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        return env

    return make


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    """Ends what a failed test leaves behind."""
    yield
    runs.end_all()


@pytest.fixture
def draw() -> random.Random:
    """Random numbers, others in every session; their seed is shown if the test fails."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    return random.Random(seed)


@pytest.fixture
def workdir(tmp_path: Path) -> epath.Path:
    """A run's directory, not made yet."""
    return epath.Path(tmp_path / "run")
