"""The architecture: who may import whom. A new file needs a floor here, and a reason for it."""

import ast
import functools
import graphlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mae_dist.__main__ import COMMANDS
from tests import NO_PARITY

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "mae_dist"
# A module imports only from floors below its own. A package stands as one.
FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "errors",
        "hardware",
        "names",
        "os_errors",
        "readable",
        "revision",
    ),
    (
        "__main__",
        "console",
        "registry",
        "storage",
    ),
    (
        "resilience",
        "task_kinds",
        "trackers",
    ),
    (
        "data",
        "model",
    ),
    ("parallel",),
    ("optim",),
    ("config",),
    (
        "checkpoint",
        "cli",
        "cpu",
    ),
    (
        "metrics",
        "platforms",
        "prepare",
        "tasks",
        "weights",
    ),
    (
        "convert",
        "evaluation",
        "sweep",
    ),
    (
        "export",
        "features",
        "knn",
        "predict",
        "reconstruct",
        "report",
        "training",
    ),
    (
        "benchmark",
        "main",
        "plan",
    ),
)
FLOOR_OF = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}


def dotted(path: Path) -> str:
    """mae_dist/data/sources/cache.py -> mae_dist.data.sources.cache; a package's __init__.py is the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {dotted(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


@functools.cache
def imports(path: Path) -> tuple[str, ...]:
    """Every module that a file imports, at its top or inside a function."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the whole name, mae_dist.…"
            assert node.module is not None
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in FILES else node.module


def ours(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] == PACKAGE} - {PACKAGE}


def top(name: str) -> str:
    """mae_dist.data.sources.cache -> data."""
    return name.split(".")[1]


def test_every_module_has_a_floor():
    """A file nobody placed is where cycles start; a floor of a file that is gone misleads."""
    assert {top(name) for name in FILES if name != PACKAGE} == set(FLOOR_OF)
    assert len(FLOOR_OF) == sum(len(floor) for floor in FLOORS)


@pytest.mark.parametrize("name", [name for name in FILES if name != PACKAGE])
def test_imports_go_down(name):
    """Strictly, except inside a package."""
    for imported in ours(FILES[name]):
        if top(imported) != top(name):
            floor, below = FLOOR_OF[top(name)], FLOOR_OF[top(imported)]
            assert below < floor, f"{name} (floor {floor}) imports {imported} (floor {below})"


def test_no_module_stands_higher_than_it_must():
    """A floor is one above the highest that is imported: a module too high hides what it needs."""
    needed: dict[str, int] = {}
    for name, path in FILES.items():
        if name != PACKAGE:
            below = [FLOOR_OF[top(i)] for i in ours(path) if top(i) != top(name)]
            needed[top(name)] = max(needed.get(top(name), 0), 1 + max(below, default=-1))
    assert needed == FLOOR_OF


def test_no_command_is_imported():
    """A command is flags and one call: what another needs of it has a place of its own."""
    commands = {name if f"{name}.__main__" not in FILES else f"{name}.__main__" for name, _ in COMMANDS.values()}
    assert commands <= FILES.keys()
    for name, path in FILES.items():
        assert not commands & ours(path), name


def test_no_cycles():
    """Inside packages too, and through imports inside functions."""
    graph = {name: ours(path) - {name} for name, path in FILES.items()}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_configs_are_data():
    """Read before JAX starts, and by people: they import other configs only."""
    for path in (ROOT / "configs").glob("*.py"):
        assert {name for name in imports(path) if not name.startswith("mae_dist.config")} <= {
            "mae_dist",
            "ml_collections",
        }, path


def test_no_utils():
    """A file named for nothing collects everything."""
    assert not {"utils", "util", "helpers", "common", "misc"} & {part for name in FILES for part in name.split(".")}


def test_tensorflow_is_never_imported():
    """Over a gigabyte, and seconds of every start."""
    for name, path in FILES.items():
        assert "tensorflow" not in {imported.split(".")[0] for imported in imports(path)}, name


def run(child_env: Callable[..., dict[str, str]], *arguments: str) -> str:
    """Standard output of a Python process that must succeed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env=child_env(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_training_starts_without_other_frameworks(child_env):
    """Nor do our dependencies import TensorFlow or PyTorch behind our back, which both are there for others to use."""
    pytest.importorskip("torch", reason=NO_PARITY)
    names = "{'tensorflow', 'torch', 'transformers', 'wandb', 'mlflow', 'trackio'}"
    run(
        child_env,
        "-c",
        f"import sys, mae_dist.main, mae_dist.training.loop; assert not {names} & set(sys.modules)",
    )


def test_main_is_light(child_env):
    """A typo in a flag is told in a fraction of a second, before JAX is imported or asks for a device."""
    run(child_env, "-c", "import sys, mae_dist.main; assert 'jax' not in sys.modules")
    text = run(child_env, "-m", "mae_dist.main", "--help")
    for flag in ("--config", "--workdir", "--coordinator_address"):
        assert flag in text
