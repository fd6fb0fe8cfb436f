"""Tables of results in a Markdown document, and the records of runs that they are made of."""

import json
from pathlib import Path
from typing import Any

import pytest
from absl import flags
from absl.testing import flagsaver
from etils import epath

from mae_dist import config as config_lib
from mae_dist.errors import ConfigError, StorageFault
from mae_dist.report import document, records
from mae_dist.report.__main__ import report
from mae_dist.report.runs import collect, find_workdirs
from tests.runs import ROOT, smoke_config

PAGE = """# Results

<!-- results
random masking: runs/random-*
grid: runs/grid-0
-->
old
<!-- end of results -->

What it means.
"""


def write_run(place: Path, metrics: dict[str, float], **fields: Any) -> None:
    """A finished run of ten steps as it lies in its workdir."""
    place.mkdir(parents=True)
    config = smoke_config(total_steps=10, data__data_dir=str(place.parent), **fields)
    (place / "config.json").write_text(config_lib.to_json(config))
    lines = [{"step": 5, "loss": 2.0}, {"step": 8, "val_loss": 1.5, "val_top1/cat": 0.1}, {"step": 10, **metrics}]
    (place / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    secs = {"start": 60.0, "step": 3540.0, "away": 9999.0}
    environment = {"commit": "0123456789abcdef"}
    summary = {"step": 10, "total_steps": 10, **metrics, "goodput": {"secs": secs}, "environment": environment}
    (place / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two seeds of random masking with linear probes, one of them with an MLP; one of grid; one that has not ended."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    place = tmp_path / "runs"
    for seed, top1 in ((0, 0.40), (1, 0.44)):
        name = f"random-{seed}"
        write_run(place / name, {"test_loss": 0.02 + 0.01 * seed, "val_knn_top1": top1 - 0.1}, seed=seed)
        probe = {"task": "probe", "init_from": f"/elsewhere/{name}", "seed": seed}
        accuracies = {"train_top1": top1 + 0.1, "val_top1": top1 + 0.05, "test_top1": top1}
        write_run(place / f"{name}-linear", accuracies, **probe, classify__head="linear")
        if seed == 0:
            write_run(place / f"{name}-mlp", {"test_top1": 0.5}, **probe, classify__head="mlp")
    write_run(place / "grid-0", {"test_loss": 0.01, "val_knn_top1": 0.2}, model__masking="grid")
    write_run(place / "random-2", {"test_loss": 9.0}, seed=2)
    (place / "random-2" / "summary.json").unlink()
    return place


def test_a_row_is_seeds_and_what_began_from_them(runs):
    """Means and deviations by hand; validation where nothing has test; what is around the block stays."""
    text = document.update(PAGE, epath.Path(runs.parent))
    lines = text.splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("| "))
    assert lines[head : head + 4] == [
        "|  | loss, test | kNN, validation | MLP probe, test | linear probe, test | seeds | hours | commit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| random masking | 0.0250 ± 0.0071 | 32.0 ± 2.8 | 50.0 (n = 1) | 42.0 ± 2.8 | 0 to 1 | 1.00 | `0123456` |",
        "| grid | 0.0100 | 20.0 | – | – | 0 | 1.00 | `0123456` |",
    ]
    assert "| random masking | linear probe | 52.0 ± 2.8 | 47.0 ± 2.8 | 42.0 ± 2.8 |" in lines
    assert any(line.startswith("python -m mae_dist.main --config=smoke ") and "grid" in line for line in lines)
    assert text.startswith("# Results\n\n<!-- results\nrandom masking: runs/random-*\n")
    assert text.endswith("<!-- end of results -->\n\nWhat it means.\n")
    assert "\nold\n" not in text
    assert document.update(text, epath.Path(runs.parent)) == text


def test_rows_against_the_first(runs):
    """Differences of equal seeds; a seed that the first row has not is left out."""
    page = PAGE.replace("<!-- results\n", "<!-- results against the first row\n")
    write_run(runs / "grid-1", {"test_loss": 0.05, "val_knn_top1": 0.4}, model__masking="grid", seed=1)
    write_run(runs / "grid-7", {"test_loss": 0.09, "val_knn_top1": 0.4}, model__masking="grid", seed=7)
    lines = document.update(page.replace("grid-0", "grid-*"), epath.Path(runs.parent)).splitlines()
    assert any(line.startswith("| random masking | 0.0250 ± 0.0071 | 32.0 ± 2.8 | 50.0 (n = 1) |") for line in lines)
    assert any(line.startswith("| grid | +0.0050 ± 0.0212 (n = 2) | -2.0 ± 11.3 (n = 2) | – | – |") for line in lines)


def test_kept_records_give_the_same_tables(runs, tmp_path, capsys):
    """Small, without the machine's places: committed, they stand for the runs."""
    with flagsaver.flagsaver(keep=str(tmp_path / "kept" / "runs")):
        assert report(["report", str(runs)]) == 0
    assert "6 runs kept" in (output := capsys.readouterr().out)
    assert "random-2: not finished" in output
    kept = tmp_path / "kept"
    assert document.update(PAGE, epath.Path(kept)) == document.update(PAGE, epath.Path(runs.parent))
    for path in (kept / "runs").rglob("*.*"):
        assert str(tmp_path) not in path.read_text()
        assert "elsewhere" not in path.read_text()
    lines = (kept / "runs" / "random-0" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [8, 10]
    page = tmp_path / "kept" / "README.md"
    page.write_text(PAGE)
    with flagsaver.flagsaver(update=str(page)):
        assert report(["report"]) == 0
        assert "has new tables" in capsys.readouterr().out
        assert report(["report"]) == 0
        assert "is as it was" in capsys.readouterr().out
    again = records.keep(collect(find_workdirs([str(kept / "runs")]))[0], epath.Path(tmp_path / "again"))
    assert [path.name for path in again] == sorted(path.name for path in (kept / "runs").iterdir())


@pytest.mark.parametrize(
    ("page", "error", "words"),
    [
        ("# Nothing", ConfigError, "has no block"),
        (PAGE.replace("grid: runs/grid-0", "grid"), ConfigError, "'grid' is no row; write LABEL: WORKDIR"),
        (PAGE.replace("grid-0", "gird-0"), StorageFault, "'grid: runs/gird-0' names no finished run"),
    ],
)
def test_what_a_page_gets_wrong(runs, page, error, words):
    with pytest.raises(error, match=words):
        document.update(page, epath.Path(runs.parent))


@pytest.mark.parametrize("page", ["docs/measurements.md", "results/README.md"])
def test_committed_tables_are_those_of_the_committed_records(page):
    """No figure is typed by hand."""
    path = ROOT / page
    text = path.read_text()
    assert document.update(text, epath.Path(path.parent)) == text, f"run: python -m mae_dist.report --update {page}"
