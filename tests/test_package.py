"""Wheel and sdist, built as a release builds them: each works alone, without the clone."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Sequence
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

import mae_dist

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HOST = PROJECT["urls"]["Repository"]


def run(command: Sequence[str | Path], cwd: Path, env: dict[str, str]) -> str:
    """Returns the output of a program that must succeed."""
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the sdist and the wheel that was built from it. No network: this environment has the backend."""
    out = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT], ROOT, dict(os.environ))
    assert sorted(path.name for path in out.iterdir()) == [
        f"mae_dist-{PROJECT['version']}-py3-none-any.whl",
        f"mae_dist-{PROJECT['version']}.tar.gz",
    ]
    return out


def metadata(built: Path) -> Message:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        return message_from_bytes(wheel.read(f"mae_dist-{PROJECT['version']}.dist-info/METADATA"))


@pytest.mark.long
def test_files_of_the_wheel(built):
    """Everything in the package, whatever its suffix, and the configs within it; nothing else."""
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = [path for name in ("mae_dist", "configs") for path in (ROOT / name).rglob("*") if path.is_file()]
    ours = {path.relative_to(ROOT).as_posix() for path in files if path.parent.name != "__pycache__"}
    assert names == {re.sub("^configs/", "mae_dist/configs/", name) for name in ours}
    assert {"mae_dist/py.typed", "mae_dist/report/style.css", "mae_dist/report/page.html.jinja"} <= names


@pytest.mark.long
def test_description(built):
    """An index shows README.md, and has none of the files beside it: every link and image is a whole address."""
    text = metadata(built).get_payload()
    assert isinstance(text, str)
    assert text.startswith("# mae_dist")
    prose = re.sub(r"^```.*?^```|`[^`]*`", "", text, flags=re.MULTILINE | re.DOTALL)
    assert not [link for link in re.findall(r"\]\(([^)]*)\)", prose) if not link.startswith(("https://", "#"))]
    for place in re.findall(rf"{re.escape(HOST)}/(?:blob|raw)/main/([^)#\s]+)", prose):
        assert (ROOT / place).exists(), place


@pytest.mark.long
def test_wheel_alone(built, child_env, tmp_path):
    """Installed into a new environment, used in an empty directory: the program trains, configs are found by name."""
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    site = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(tmp_path / "venv")}))
    # The requirements are those of this environment; its editable install of the clone is not seen through such lines.
    requirements = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "requirements.pth").write_text("\n".join(requirements))
    env = child_env()
    del env["PYTHONPATH"]
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    run([*pip, wheel], tmp_path, env)
    empty = tmp_path / "empty"
    empty.mkdir()
    program = """if True:
        import mae_dist, sys
        assert "jax" not in sys.modules
        print(mae_dist.__version__, mae_dist.__file__, mae_dist.get_config("cifar_small_probe").task)
    """
    version, place, task = run([python, "-c", program], empty, env).split()
    assert (version, task) == (PROJECT["version"], "probe")
    assert Path(place).is_relative_to(site)
    run([tmp_path / "venv/bin/mae-dist", "train", "--config", "smoke", "--config.total_steps=4"], empty, env)
    assert mae_dist.open_run(empty / "runs/smoke").step == 4
    run([tmp_path / "venv/bin/mae-dist", "report", "runs/smoke", "--out", "report.html"], empty, env)
    assert "<style>" in (empty / "report.html").read_text()


@pytest.mark.long
def test_sdist_alone(built, child_env, tmp_path):
    """Tests run from it, also those that read documents and scripts."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (clone,) = tmp_path.iterdir()
    env = child_env() | {"PYTHONPATH": str(clone)}
    tests = ["tests/test_registry.py", "tests/test_docs_site.py", "tests/test_launch.py"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not long",
        *tests,
        "--durations=9",
    ]
    assert re.search(r"\d+ passed", run(command, clone, env))
