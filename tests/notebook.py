"""Executes docs/own_images.ipynb in a directory of its own: `python -m tests.notebook` stores the outputs in it.

    python -m tests.notebook [--out F] [--set IMAGES=/my/images] [--set steps=10]

`--set` replaces the value of an assignment or of an argument, wherever it stands in the notebook.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from mae_dist import hardware

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs/own_images.ipynb"


def replaced(source: str, name: str, value: str) -> str:
    """Returns the source of a cell with the value of `name = …` or `name=…` replaced."""
    value = value if value.isdigit() else json.dumps(value)
    return re.sub(rf"\b{name}( ?= ?)(None|\d+)", rf"{name}\g<1>{value}", source)


def execute(notebook: nbformat.NotebookNode) -> None:
    """Fills in the outputs; raises `nbclient.exceptions.CellExecutionError` for a cell that fails."""
    with tempfile.TemporaryDirectory() as directory:
        client = NotebookClient(
            notebook, timeout=1500, record_timing=False, resources={"metadata": {"path": directory}}
        )
        with client.setup_kernel():
            for index, cell in enumerate(notebook.cells):
                began = time.monotonic()
                client.execute_cell(cell, index)
                if cell.cell_type == "code":
                    print(f"{time.monotonic() - began:6.1f} s  {cell.source.splitlines()[0]}", flush=True)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=NOTEBOOK)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    given = parser.parse_args()
    for name in ("MPLBACKEND", "XLA_FLAGS", "NPROC"):  # a test's: figures belong into the notebook
        os.environ.pop(name, None)
    hardware.keep_libtpu_from_starting()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(NOTEBOOK.parent.parent), *filter(None, [os.getenv("PYTHONPATH")])])
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for assignment in given.set:
        name, _, value = assignment.partition("=")
        before = [cell.source for cell in notebook.cells]
        for cell in notebook.cells:
            cell.source = replaced(cell.source, name, value)
        if [cell.source for cell in notebook.cells] == before:
            sys.exit(f"--set {assignment}: nothing in the notebook is named so")
    metadata = notebook.metadata.copy()
    execute(notebook)
    notebook.metadata = metadata  # without the version of this Python
    nbformat.write(notebook, given.out)
    print(f"{given.out}: {given.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
