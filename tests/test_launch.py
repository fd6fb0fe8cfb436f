"""The scripts a user starts with, run for real in small clones: real venvs and real pip, but nothing to download."""

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["launch/local.sh", "launch/venv.sh", "tests/run.sh", ".ci/run"]

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "mae_dist"
version = "0.1.0"
optional-dependencies = { test = [], parity = [] }
"""

# An editable wheel is a zip with a .pth file and three lines of metadata.
BACKEND = """
import os, zipfile
def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    if os.environ.get("BREAK_INSTALL"):
        raise RuntimeError("broken on purpose")
    file_name = "mae_dist-0.1.0-py3-none-any.whl"
    info = "mae_dist-0.1.0.dist-info/"
    with zipfile.ZipFile(os.path.join(wheel_directory, file_name), "w") as wheel:
        wheel.writestr("mae_dist.pth", os.getcwd())
        name_and_version = "Name: mae_dist\\nVersion: 0.1.0\\n"
        extras = "Provides-Extra: test\\nProvides-Extra: parity\\n"
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\n" + extras + name_and_version)
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "RECORD", "")
    return file_name
def build_wheel(*args):
    raise NotImplementedError
"""

# Stands for Python where a real environment would take seconds: makes one of itself, and prints what else it is asked.
PYTHON_STUB = """#!/bin/bash
case "$*" in
    *"-m venv"*) mkdir -p "${!#}/bin" && cp "$0" "${!#}/bin/python" ;;
    *"pip install"*) echo "PIP $*" ;;
    *"-m pytest"*) echo "RAN $*" ;;
    *platform*) echo 3.13.0 ;;
    *hashlib*) echo "the same" ;;
esac
"""
SHOW_ARGUMENTS = "import os, sys; print('RAN', __spec__.name, sys.argv[1:], os.path.basename(os.getcwd()))\n"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone with our scripts, whose package has programs that print how they were called."""
    clone = tmp_path / "a clone"  # a space, as in many a home directory
    for script in SCRIPTS:
        (clone / script).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / script, clone / script)
    (clone / "pyproject.toml").write_text(PYPROJECT)
    (clone / "backend.py").write_text(BACKEND)
    for module in ("mae_dist/main", "mae_dist/reconstruct", "pytest"):
        (clone / module).parent.mkdir(exist_ok=True)
        (clone / f"{module}.py").write_text(SHOW_ARGUMENTS)
    return clone


@pytest.fixture
def run(clone: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run(script, *arguments, **environment)` in another directory than the clone, with this Python first on PATH."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "python3.13").symlink_to(sys.executable)

    def start(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "PYTHONPATH", "VIRTUAL_ENV")}
        env |= {"PATH": f"{binaries}:{env['PATH']}", "PIP_NO_INDEX": "1"} | environment
        command = ["bash", str(clone / script), *arguments]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)

    return start


def _executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_valid_and_executable(script: str):
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
    assert script == "launch/venv.sh" or os.access(ROOT / script, os.X_OK)


@pytest.mark.long
def test_local_sh_from_first_run_to_last(clone: Path, run):
    first = run("launch/local.sh")
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines() == [
        "RAN mae_dist.main ['--config', 'configs/quickstart.py'] a clone",
        "RAN mae_dist.reconstruct ['--workdir', 'runs/quickstart'] a clone",
        "RAN mae_dist.main ['--config', 'configs/quickstart_probe.py'] a clone",
    ]
    assert "installing mae_dist and what it needs" in first.stderr
    assert f"in {clone}:\n\n  picture    runs/quickstart/pictures/\n" in first.stderr
    assert "accuracy   see runs/quickstart_probe/summary.json\n" in first.stderr

    # What a run leaves is found: the last picture, the accuracy.
    for name in ("quickstart/pictures/test_00000101.png", "quickstart/pictures/test_00001213.png"):
        (clone / "runs" / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / "runs" / name).touch()
    (clone / "runs/quickstart_probe").mkdir()
    (clone / "runs/quickstart_probe/summary.json").write_text('{"test_top1": 0.9721}')
    second = run("launch/local.sh").stderr
    assert "picture    runs/quickstart/pictures/test_00001213.png\n" in second
    assert "accuracy   97.2 % of the test digits" in second

    # The second time nothing is installed, and arguments reach main as they are.
    again = run("launch/local.sh", "--config", "configs/a b.py", BREAK_INSTALL="1")
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout == "RAN mae_dist.main ['--config', 'configs/a b.py'] a clone\n"

    # Changed requirements are installed again.
    (clone / "pyproject.toml").write_text(PYPROJECT + 'description = "changed"\n')
    assert "installing" in run("launch/local.sh", "x").stderr

    # An install that was cut short is not trusted, nor is one whose process is still at work disturbed.
    (clone / ".venv/installing").write_text("999999999")
    assert "was interrupted: starting afresh" in run("launch/local.sh", "x").stderr
    (clone / ".venv/installing").write_text(str(os.getpid()))
    busy = run("launch/local.sh", "x")
    assert busy.returncode == 1
    assert f"process {os.getpid()} is installing" in busy.stderr


def test_run_sh_installs_what_its_flags_need(tmp_path: Path, clone: Path, run):
    stub = str(_executable(tmp_path / "stub", PYTHON_STUB))
    workers = "-n auto --maxprocesses=8 --dist=worksteal"
    light = run("tests/run.sh", "--no-parity", "-k", "a b", PYTHON=stub)
    assert light.returncode == 0, light.stderr
    assert light.stdout == f"RAN -m pytest {workers} -k a b\n"
    assert "installing mae_dist[test] and" in light.stderr
    assert f"--editable {clone}[test]\n" in light.stderr  # what pip prints is seen, but is not the script's output
    assert "--quiet" not in light.stderr

    # Nothing is installed twice; PyTorch is, once it is wanted, and stays without harm.
    assert run("tests/run.sh", "--no-parity", PYTHON=stub).stderr == ""
    whole = run("tests/run.sh", "--long", PYTHON=stub)
    assert whole.stdout == f"RAN -m pytest {workers} --long\n"
    assert f"--editable {clone}[test,parity]\n" in whole.stderr
    (clone / ".venv/installed-test").unlink()
    for arguments in (("tests/run.sh",), ("tests/run.sh", "--no-parity"), ("launch/local.sh", "x")):
        assert run(*arguments, PYTHON=stub).stderr == ""
    for one in ("pytest.py", "pytest.py::test_x"):  # a file of the clone
        assert run("tests/run.sh", one, "--no-parity", "-x", PYTHON=stub).stdout == f"RAN -m pytest {one} -x\n"


@pytest.mark.long
def test_run_sh_makes_the_venv_that_local_sh_then_uses(run):
    tests = run("tests/run.sh", "-k", "x")
    assert tests.returncode == 0, tests.stderr
    assert "installing mae_dist[test,parity]" in tests.stderr
    workers = "'-n', 'auto', '--maxprocesses=8', '--dist=worksteal'"
    assert tests.stdout == f"RAN pytest [{workers}, '-k', 'x'] a clone\n"
    for one in ("pytest.py", "pytest.py::test_x"):  # a file of the clone
        assert run("tests/run.sh", one, "-k", "x").stdout == f"RAN pytest ['{one}', '-k', 'x'] a clone\n"
    assert run("launch/local.sh", "x").stderr == ""


@pytest.mark.long
def test_half_made_venv_and_failed_install_are_made_anew(clone: Path, run):
    (clone / ".venv/bin").mkdir(parents=True)
    (clone / ".venv/bin/python").symlink_to(sys.executable)  # no pyvenv.cfg and no pip yet
    failed = run("launch/local.sh", "x", BREAK_INSTALL="1")
    assert failed.returncode == 1
    assert "is incomplete: starting afresh" in failed.stderr
    assert "the install failed" in failed.stderr
    cured = run("launch/local.sh", "x")
    assert cured.returncode == 0, cured.stderr


def test_python_that_is_too_old_is_named(tmp_path: Path, clone: Path, run):
    old = _executable(tmp_path / "old", '#!/bin/bash\n[[ "$2" == *platform* ]] && echo 3.9.2 && exit\nexit 1\n')
    asked = run("launch/local.sh", PYTHON=str(old))
    assert asked.returncode == 1
    assert f"PYTHON={old} is 3.9.2, but Python 3.11 or newer is needed" in asked.stderr
    missing = run("launch/local.sh", PYTHON="/nowhere/python")
    assert "/nowhere/python is not runnable" in missing.stderr
    assert not (clone / ".venv").exists()


def test_no_python_at_all_says_what_to_install(tmp_path: Path, run):
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname"):
        (tools / tool).symlink_to(shutil.which(tool) or "")
    # A version manager's shim: on PATH, but it fails when it is run.
    _executable(tools / "python3.12", "#!/bin/bash\necho 'version 3.12 is not installed' >&2\nexit 127\n")
    none = run("launch/local.sh", PATH=str(tools))
    assert none.returncode == 1
    assert "no Python 3.11 or newer found" in none.stderr
    assert "sudo apt-get install" in none.stderr


def test_python_without_venv_names_the_package(tmp_path: Path, run):
    # Debian's python3 without python3-venv has no ensurepip: an import hook takes it away here.
    (tmp_path / "site").mkdir()
    (tmp_path / "site/ensurepip.py").write_text("raise ImportError('not packaged')")
    lacking = run("launch/local.sh", PYTHONPATH=str(tmp_path / "site"))
    assert lacking.returncode == 1
    assert "venv or ensurepip module is missing" in lacking.stderr
    assert f"python{sys.version_info.major}.{sys.version_info.minor}-venv" in lacking.stderr
