"""The table of an accelerator, with tiny models on the CPU: real rows in real processes."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from mae_dist.benchmark import correctness, row
from mae_dist.benchmark.accelerator import DEVICE, ROWS
from mae_dist.errors import EXIT_CONFIG, EXIT_DONE, EXIT_INTERNAL
from tests.conftest import ROOT

HAS_PARITY = bool(find_spec("torch") and find_spec("transformers"))


def run(env: dict[str, str], out: Path, *args: str, code: int) -> dict[str, dict]:
    """The rows of a table that ends with `code`; accelerator.md has all of them too."""
    command = [sys.executable, "-m", "mae_dist.benchmark", "--accelerator", f"--out={out}", *args]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    result = json.loads((out / "accelerator.json").read_text())
    assert result["device"]["platform"] == "cpu"
    assert result["tiny"]
    text = (out / "accelerator.md").read_text()
    assert all(f"| {name} |" in text for name in result["rows"])
    assert text in done.stdout
    return result["rows"]


def test_every_row_has_a_function():
    assert {*row.ROWS} == {DEVICE.name, *(one.name for one in ROWS)}


@pytest.mark.long
def test_checks_run(child_env: Callable[..., dict[str, str]], tmp_path: Path):
    """All pass; one that is stopped fails alone, and with it the command."""
    names = [one.name for one in ROWS if one.checks]
    rows = run(child_env(), tmp_path, f"--rows={','.join(names)}", "--limits=remat=0.01", code=EXIT_INTERNAL)
    assert list(rows) == names
    stopped = rows.pop("remat")
    assert (stopped["status"], stopped["reason"]) == ("failed", "stopped after its limit of 0.01 s")
    assert rows.pop("resume_deterministic")["status"] == "skipped"
    results = {name: (found["status"], found["reason"]) for name, found in rows.items()}
    assert results == dict.fromkeys(rows, ("passed", ""))
    assert rows["resume"]["figures"]["bit_equal"]
    assert 20 <= rows["resume"]["figures"]["killed_at_step"] < 60


@pytest.mark.long
def test_speeds_run(child_env: Callable[..., dict[str, str]], tmp_path: Path):
    """All are measured; those against PyTorch where that is installed."""
    names = [one.name for one in ROWS if not one.checks]
    rows = run(child_env(), tmp_path, f"--rows={','.join(names)}", code=EXIT_DONE)
    assert list(rows) == names
    for name in names:
        wanted = "measured" if HAS_PARITY or not name.startswith("hf_") else "skipped"
        assert rows[name]["status"] == wanted, rows[name]
    for name in ("vit_s16", "vit_b16", "vit_l16", "vit_h14"):
        assert len(rows[name]["figures"]["steps"]) == 2
        assert all(0 < found["mfu"] < 1 for found in rows[name]["figures"]["steps"].values())
    figures = rows["input_b16"]["figures"]
    assert 0 <= figures["waiting_for_data"] < 1
    assert all(value > 0 for name, value in figures.items() if name.endswith("images_per_sec"))


def test_an_error_beyond_its_limit_is_a_fault():
    """NaN, too, which compares as below nothing."""
    assert correctness._faults({"a": float("nan"), "b": 0.2, "c": 0.1}, {"a": 1, "b": 0.1, "c": 0.1}) == [
        "a nan is not below 1",
        "b 0.2 is not below 0.1",
    ]


@pytest.mark.long
def test_the_time_is_kept(child_env: Callable[..., dict[str, str]], tmp_path: Path):
    """What takes longer than is left is not begun, and named; that is no failure."""
    rows = run(child_env(), tmp_path, "--rows=training,hf_l16", "--minutes=1.4", code=EXIT_DONE)
    assert rows["training"]["status"] == "passed"
    assert rows["hf_l16"]["status"] == "not run"
    assert "give more --minutes" in rows["hf_l16"]["reason"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--accelerator", "--out=o", "--rows=vit_b61"), "there is no row 'vit_b61'. Did you mean 'vit_b16'?"),
        (("--accelerator", "--out=o", "--limits=remat"), "--limits has 'remat'; write ROW=SECONDS"),
        (("--accelerator", "--out=o", "--config=smoke"), "leave --config, --against and --scaling out"),
        pytest.param(("--accelerator",), "--out is missing", marks=pytest.mark.long),
        pytest.param(("--config=smoke", "--rows=remat"), "--rows is for --accelerator", marks=pytest.mark.long),
    ],
)
def test_flags_that_cannot_work_are_refused(
    child_env: Callable[..., dict[str, str]], flags: tuple[str, ...], told: str
):
    done = subprocess.run(
        [sys.executable, "-m", "mae_dist.benchmark", *flags],
        cwd=ROOT, env=child_env(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == EXIT_CONFIG, done.stderr
    assert told in done.stderr
