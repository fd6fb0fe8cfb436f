"""docs/own_images.ipynb: stored with small outputs, and executed, on pictures that it draws and on a user's folder."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat import NotebookNode
from PIL import Image

from tests import notebook as command
from tests.commands import ROOT

REPOSITORY = "mae-dist/mae_dist"


@pytest.fixture(scope="module")
def stored() -> NotebookNode:
    return nbformat.read(command.NOTEBOOK, as_version=4)


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook: NotebookNode, stream: str) -> str:
    outputs = [output for cell in code(notebook) for output in cell.outputs if output.output_type == "stream"]
    return "".join(output.text for output in outputs if output.name == stream)


def num_pictures(notebook: NotebookNode) -> int:
    return sum("image/jpeg" in output.get("data", {}) for cell in code(notebook) for output in cell.outputs)


def test_stored_with_outputs(stored: NotebookNode) -> None:
    """As one undisturbed run left it: pictures, no errors or warnings, nothing of the machine that ran it."""
    nbformat.validate(stored)
    assert [cell.execution_count for cell in code(stored)] == [*range(1, 1 + len(code(stored)))]
    assert num_pictures(stored) == 6
    assert {output.output_type for cell in code(stored) for output in cell.outputs} <= {"stream", "display_data"}
    assert printed(stored, "stderr") == ""
    assert command.NOTEBOOK.stat().st_size < 600_000
    text = command.NOTEBOOK.read_text(encoding="utf-8")
    assert not re.findall(r'(?<![\w.:/])/(?:home|root|work|tmp|var|opt|usr|Users)/[^"]{0,40}', text)
    assert "IMAGES = None" in text
    assert "LABELS = None" in text


def test_links(stored: NotebookNode) -> None:
    """Colab opens this file of the main branch; every other link is to this repository, too."""
    text = "\n".join(cell.source for cell in stored.cells)
    place = command.NOTEBOOK.relative_to(ROOT).as_posix()
    assert f"(https://colab.research.google.com/github/{REPOSITORY}/blob/main/{place})" in text
    links = [link for link in re.findall(r"https://[^\s)\"]+", text) if "colab.research.google.com" not in link]
    assert links
    assert all(link.startswith(f"https://github.com/{REPOSITORY}") for link in links)


def execute(out: Path, env: dict[str, str], *options: str) -> NotebookNode:
    done = subprocess.run(
        [sys.executable, "-m", "tests.notebook", "--out", str(out), *options],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return nbformat.read(out, as_version=4)


@pytest.mark.long
def test_runs_without_a_folder(tmp_path: Path, child_env: Callable[..., dict[str, str]]) -> None:
    """Trained for fewer steps, for the suite's limit of 300 s, it distinguishes the pictures."""
    done = execute(tmp_path / "done.ipynb", child_env(), "--set", "steps=100")
    assert printed(done, "stderr") == ""
    assert num_pictures(done) == 6
    found = re.search(r"1800 pictures without a label: (\d+)% of the predictions are right", printed(done, "stdout"))
    assert found is not None
    assert int(found[1]) > 35  # chance is 20; 46 here


def photographs(root: Path) -> None:
    """Writes an untidy folder: many sizes and formats, other files, and one that does not decode."""
    rng = np.random.default_rng(0)
    for number in range(40):
        shape = (int(rng.integers(70, 300)), int(rng.integers(70, 300)), 3)
        suffix = ("jpg", "PNG", "webp", "gif")[number % 4]
        path = root / f"album {number % 3}" / f"photo {number}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(path)
    Image.fromarray(rng.integers(0, 256, (80, 90, 4), np.uint8), "CMYK").save(root / "print.jpg")
    (root / "broken.jpg").write_bytes((root / "print.jpg").read_bytes()[:300])
    (root / "notes.txt").write_text("no image")


@pytest.mark.long
def test_runs_on_a_folder(tmp_path: Path, child_env: Callable[..., dict[str, str]]) -> None:
    """Of few images and one broken file, with a table of labels."""
    photographs(tmp_path / "photos")
    rows = [f"album {n % 3}/photo {n}.{('jpg', 'PNG', 'webp', 'gif')[n % 4]},album {n % 3}" for n in range(24)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *rows]))
    options = [
        "--set",
        f"IMAGES={tmp_path / 'photos'}",
        "--set",
        f"LABELS={tmp_path / 'labels.csv'}",
        "--set",
        "steps=20",
    ]
    done = execute(tmp_path / "done.ipynb", child_env(), *options)
    text = printed(done, "stdout")
    assert "41 images, and 1 that do not decode\n  broken.jpg: " in text
    assert num_pictures(done) == 6
