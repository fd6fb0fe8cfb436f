"""The report: what it says of real runs, finished or not, and that any browser shows it without network or script."""

import html.parser
import json
import math
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from configs import default
from mae_dist import config as config_lib
from mae_dist.errors import ConfigError, DataFault, StorageFault
from mae_dist.metrics.results import spread
from mae_dist.report import __main__, figures, model, pictures, tables
from mae_dist.report.groups import Group, family_names, group
from mae_dist.report.plot import STYLE
from mae_dist.report.runs import Masking, Run, collect, find_workdirs
from mae_dist.sweep import points
from tests.runs import ROOT, run

HOSTILE = "<script>alert('$x$')</script> & co"
SMALL = (
    "--config=configs/smoke.py",
    "--config.model.depth=1",
    "--config.log_every_steps=2",
    "--config.checkpoint.every_steps=0",
    "--config.data.num_examples=256",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, child_env):
    """A directory with a pretraining and two probes of it; the second is the first with other figures and seed."""
    root = tmp_path_factory.mktemp("report")
    for name, fields in (
        ("mae", ("--config.total_steps=8", "--config.eval.every_steps=4", "--config.pictures.every_steps=4")),
        ("mae_probe_s0", ("--config.task=probe", f"--config.init_from={root / 'mae'}", "--config.total_steps=6")),
    ):
        code, output = run(child_env(), *SMALL, *fields, f"--config.name={name}", f"--workdir={root / name}")
        assert code == 0, output
    copy(root / "mae_probe_s0", root / "mae_probe_s1", name="mae_probe_s1", seed=1, model__mask_ratio=0.1)
    for name, value in (("mae_probe_s0", 0.5), ("mae_probe_s1", 0.7)):
        set_last(root / name, test_top1=value, val_top1=0.25)
    return root


def copy(source, target, **fields):
    """A run's workdir elsewhere, with fields of its config changed."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    for field, value in fields.items():
        section, _, key = field.rpartition("__")
        (config[section] if section else config)[key] = value
    (target / "config.json").write_text(json.dumps(config))
    return target


def set_last(workdir, **values):
    """Changes the last record."""
    path = workdir / "metrics.jsonl"
    *lines, last = path.read_text().splitlines()
    path.write_text("\n".join([*lines, json.dumps(json.loads(last) | values)]) + "\n")


def make(out, *workdirs, **values):
    """Runs the command in this process; the page."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(out=str(out), **values):
        assert __main__.report(["report", *map(str, workdirs)]) == 0
    return Path(out).read_text(encoding="utf-8")


def read(*workdirs):
    """The runs in these workdirs, in groups."""
    runs, unreadable = collect(find_workdirs(map(str, workdirs)))
    assert not unreadable
    return group(runs)


def fake(workdir, *, config=None, done=True, **values):
    """A workdir as a run of 5 updates leaves it, or at its third update; what a report reads without models."""
    config = config or default.get_config()
    fields = {name: values.pop(name) for name in list(values) if name.split("__")[0] in config}
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({field.replace("__", "."): value for field, value in fields.items()})
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(config_lib.to_json(config))
    (workdir / "metrics.jsonl").write_text(json.dumps({"step": 5 if done else 3, **values}) + "\n")
    if done:
        (workdir / "summary.json").write_text(json.dumps({"step": 5, "total_steps": 5}))
    return workdir


def fake_sweep(out, over, then, accuracy):
    """The workdirs of a sweep over two seeds; `accuracy` of (stage, its config) is the test top-1 of what follows."""
    base = default.get_config()
    swept = points.parse_over(over, base)
    for point in points.make_points(base, default.__file__, {}, swept, range(2), out, {name: {} for name in then}):
        assert not point.fault
        for stage in point.stages:
            if not stage.workdir.exists():
                values = {"test_top1": accuracy(stage.name, stage.config)} if stage.name != "pretrain" else {}
                fake(stage.workdir, config=stage.config, val_loss=1.0, **values)


class Page(html.parser.HTMLParser):
    """Refuses markup that does not nest; gathers ids, addresses, and the elements' names."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.addresses, self.names, self.unnamed = [], [], [], [], []
        self.loading = re.compile(r"src|srcset|poster|href|.*:href|action|formaction|data|background|on.*")
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.names.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.addresses += [value for name, value in attrs if self.loading.fullmatch(name)]
        if (tag == "img" and not given.get("alt")) or ("plot" in str(given.get("class")).split() and not given.get(
            "aria-label"
        )):  # fmt: skip
            self.unnamed.append(given)
        if tag not in ("meta", "img", "line", "link", "br", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check(text):
    """A whole page that refers to nothing outside of it; as a `Page`."""
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert not page.unnamed
    for address in page.addresses:
        assert address.startswith(("data:image/png;base64,", "#")), address
        assert not address.startswith("#") or address[1:] in page.ids
    for name in re.findall(r"url\(#([^)]+)\)", text):
        assert name in page.ids
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert not re.search(r"//|@import|url\(", style)
    assert "script" not in page.names
    assert "content=\"default-src 'none'; " in text
    return page


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    """(the page of all three, with models; the directory of its figures)."""
    directory = tmp_path_factory.mktemp("whole")
    return make(directory / "report.html", trained, figures=str(directory / "figures")), directory


@pytest.mark.long
def test_page(whole):
    """Everything is there, in one file that needs nothing."""
    text, _ = whole
    page = check(text)
    for heading in ("Results", "Curves: pretrain", "Curves: probe", "Reconstructions over time", "Models",
                    "Where the time went", "Configurations", "Checkpoints"):  # fmt: skip
        assert f">{heading}</h2>" in text
    for shown in ("60.00 ± 14.14 %", "n = 2", "step 8 of 8", "Step 4", "Step 8", "Confusion matrix", "t-SNE",
                  "Accuracy of each class", "all 51 test images", "mae_probe_s*", "optim.base_lr"):  # fmt: skip
        assert shown in text.replace("<wbr>", ""), shown
    assert text.count("good</td>") == 3
    assert page.names.count("img") == 2
    # Pictures, curves of the pretraining and of the probes, time, classes, predictions, confusion, features of patches
    # and of images.
    assert page.names.count("figure") == 2 + 4 + 7 + 1 + 1 + 2 + 1 + 1
    assert page.names.count("caption") == page.names.count("table")
    assert "The features are those of mae" in text
    assert (", commit " in text) == (ROOT / ".git").exists()


@pytest.mark.long
def test_figures_are_files_too(whole):
    """Each as a picture and as a drawing that other programs read."""
    directory = whole[1] / "figures"
    names = {path.stem for path in directory.iterdir()}
    assert {"time", "per_class", "pretrain_loss", "probe_val_top1", "confusion_mae_probe_s0", "embedding_mae"} <= names
    assert "patch_features_mae" in names
    for name in names:
        with Image.open(directory / f"{name}.png") as picture:
            assert min(picture.size) > 200
        assert ElementTree.parse(directory / f"{name}.svg").getroot().tag.endswith("svg")


def test_groups_and_deviation(trained):
    """Runs that differ in seed, name and place only: .5 and .7 have mean .6 and sample deviation .1 times root 2.

    Their masking is that of the pretraining they begin from, whatever their own config inherited.
    """
    groups = read(trained)
    assert [(one.label, len(one.runs)) for one in groups] == [("mae", 1), ("mae_probe_s*", 2)]
    found = spread(groups[1].values("test_top1"))
    assert found.mean == pytest.approx(0.6)
    assert found.std == pytest.approx(math.sqrt(0.02))
    assert {run.masking for run in groups[1].runs} == {Masking("random", 0.75)}
    assert tables.number([0.3195, 0.3408]) == "0.330 ± 0.015"
    assert tables.number([1234.5]) == "1,234"


def test_other_fields_make_other_groups(trained, tmp_path):
    """Also if it is the pretraining's; and then accuracy is drawn against what differs."""
    probes = [trained / "mae_probe_s0", trained / "mae_probe_s1"]
    for name, field, value in (("grid", "model__masking", "grid"), ("half", "model__mask_ratio", 0.5)):
        copy(trained / "mae", tmp_path / name, **{"name": name, field: value})
        probes.append(copy(probes[0], tmp_path / f"{name}_probe", init_from=str(tmp_path / name)))
    groups = read(*probes, copy(probes[0], tmp_path / "wide", classify__hidden_dim=7))
    assert [len(one.runs) for one in groups] == [2, 1, 1, 1]
    both, grid, half, wide = groups
    assert (grid.shown.masking, half.shown.masking) == (Masking("grid", 0.75), Masking("random", 0.5))
    assert both.family == grid.family == half.family != wide.family
    (ratio,) = figures.against_masking([both, half], "test_top1")
    assert (
        ratio.alt == "Test top-1 against the masking ratio: random 0.5: 50.00 %; random 0.75: 60.00 ± 14.14 % (n = 2)"
    )
    (strategy,) = figures.against_masking([both, grid], "test_top1")
    assert strategy.alt.startswith("Test top-1 against the masking strategy: grid 0.75: 50.00 %; random 0.75: 60.00")
    assert not figures.against_masking([both, wide], "test_top1")


def test_a_sweep_against_its_masking(tmp_path):
    """Points of all that was swept, none of which covers another; a baseline without masking is one experiment."""
    over = ["model.mask_ratio=.5,.75", "classify.hidden_dim=64,128"]

    def accuracy(name, config):
        return (config.seed + (config.classify.hidden_dim == 128) + config.model.mask_ratio - 0.5) / 4

    fake_sweep(tmp_path, over, ["probe", "scratch"], accuracy)
    groups = read(tmp_path)
    probes = [one for one in groups if one.task == "probe"]
    assert [len(one.runs) for one in probes] == [2] * 4
    (plot,) = figures.against_masking(probes, "test_top1")
    found = plot.alt.removeprefix("Test top-1 against the masking ratio: ").split("; ")
    assert found == [
        "hidden_dim 128, random 0.5: 37.50 ± 17.68 % (n = 2)",
        "hidden_dim 128, random 0.75: 43.75 ± 17.68 % (n = 2)",
        "hidden_dim 64, random 0.5: 12.50 ± 17.68 % (n = 2)",
        "hidden_dim 64, random 0.75: 18.75 ± 17.68 % (n = 2)",
    ]
    scratch = [one for one in groups if one.task == "finetune"]
    assert [len(one.values("test_top1")) for one in scratch] == [2, 2]
    assert not figures.against_masking(scratch, "test_top1")


def test_the_legend_covers_nothing(tmp_path):
    """It is below the axes, which keep their height however many experiments there are."""
    fake_sweep(tmp_path, ["model.mask_ratio=.5,.75", "classify.hidden_dim=1,2,3,4,5,6"], ["probe"], lambda *_: 0.5)
    probes = [one for one in read(tmp_path) if one.task == "probe"]
    with matplotlib.rc_context(STYLE):
        (plot,) = figures.against_masking(probes, "test_top1")
        figure = plot.figure
        figure.draw_without_rendering()
        (legend,), (axes,) = figure.legends, figure.axes
        assert len(legend.get_texts()) == 6
        box, of_axes = legend.get_window_extent(), axes.get_window_extent()
        around = axes.get_tightbbox()
        assert around is not None
        assert box.y1 <= around.y0
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert of_axes.height / figure.dpi > 1.6


def test_unfinished_runs_do_not_count(tmp_path):
    """As long as others of the group have finished; runs of one seed count as their mean."""
    for name, seed, done, value in (
        ("a", 0, True, 0.2),
        ("b", 1, True, 0.4),
        ("again", 1, True, 0.6),
        ("c", 2, False, 0.9),
    ):
        fake(tmp_path / name, name=name, seed=seed, done=done, val_loss=value, test_top1=value)
    (one,) = read(tmp_path)
    assert one.values("test_top1") == pytest.approx([0.2, 0.5])
    text = make(tmp_path / "r.html", tmp_path, quick=True)
    check(text)
    assert "n = 2 of 3" in text
    assert "35.00 ± 21.21 %" in text
    (one,) = read(fake(tmp_path / "x" / "d", done=False, test_top1=0.1), fake(tmp_path / "x" / "e", done=False, seed=1))
    assert one.values("test_top1") == [0.1]


def test_other_weights_make_other_groups(tmp_path):
    """Whether they are a run's, converted, in another layout, or gone; and other masks do."""
    for name in ("hf_a", "hf_b"):
        (tmp_path / name).mkdir()
        stored = {"model_type": "vit_mae", "mask_ratio": 0.6, "id2label": {"0": "LABEL_0"}}
        (tmp_path / name / "config.json").write_text(json.dumps(stored))
    for name in ("converted_a", "converted_b"):
        (fake(tmp_path / name, name=name) / "checkpoints" / "0").mkdir(parents=True)
    fake(tmp_path / "long", seed=0, total_epochs=9.0)
    for seed in range(2):
        fake(tmp_path / f"mae_{seed}", seed=seed)
        fake(tmp_path / f"tuned_{seed}", task="finetune", seed=seed, init_from=str(tmp_path / f"mae_{seed}"))
    weights = ["hf_a", "hf_b", "converted_a", "converted_b", "gone_a", "gone_b", "long", "mae_0", "tuned_0"]
    for seed in range(2):
        for name in weights:
            source = str(tmp_path / name.replace("_0", f"_{seed}"))
            fake(tmp_path / "runs" / f"{name}_{seed}", task="probe", seed=seed, init_from=source)
    groups = read(tmp_path / "runs")
    assert sorted([run.workdir.name for run in one.runs] for one in groups) == sorted(
        [f"{name}_0", f"{name}_1"] for name in weights
    )
    assert Masking("random", 0.6) in [one.shown.masking for one in groups]
    assert len(set(family_names(groups).values())) == len(weights)
    for name in ("cross", "ring"):
        fake(tmp_path / "masks" / name, name=name, model__masking="user", model__mask_file=f"{name}.npy", val_top1=0.5)
    groups = read(tmp_path / "masks")
    assert len(groups) == 2
    (plot,) = figures.against_masking(groups, "val_top1")
    assert "user cross.npy 0.75: 50.00 %" in plot.alt


def test_curves_end_in_the_test_value(tmp_path):
    """Where there is one, and then the title says so."""
    fake(tmp_path / "a", name="a", val_knn_top1=0.5, test_knn_top1=0.4, val_ridge_top1=0.5)
    text = make(tmp_path / "r.html", tmp_path, quick=True)
    assert "Validation kNN top-1, ◆ test" in text
    assert "Validation ridge top-1<" in text


def test_features_without_distances():
    """Told: scikit-learn's t-SNE would crash."""
    rng = np.random.default_rng(0)
    for features, words in (
        (np.ones((100, 8)), "those of all images are equal"),
        (np.full((100, 8), np.nan), "not finite"),
        (rng.normal(size=(3, 8)), "there are 3 images only"),
    ):
        features = features.astype(np.float32)
        labels = np.zeros(len(features), np.int64)
        nothing = np.zeros((0, 4, 4, 3), np.float32)
        seen = model.Seen("a test", "none", ("x",), nothing, features, labels, None, nothing)
        with pytest.raises(DataFault, match=words):
            model.embed(seen)


def test_fractions_are_shown_in_percent():
    """Also of the lowest and the median class; a loss is none."""
    fractions = [name for name in ("val_top1", "top5", "val_top1_min", "test_top1_median", "val_loss", "val_knn_top1")
              if tables.is_fraction(name)]  # fmt: skip
    assert fractions == ["val_top1", "top5", "val_top1_min", "test_top1_median", "val_knn_top1"]


def test_a_pretraining_that_was_moved(trained, tmp_path):
    """It is looked for beside the probe; one that is gone is told."""
    probe = copy(trained / "mae_probe_s0", tmp_path / "probe", init_from="/nowhere/mae")
    (run_alone,) = read(probe)[0].runs
    assert [origin.place for origin in run_alone.origins] == [None]
    assert "init_from='/nowhere/mae'" in run_alone.faults[0]
    copy(trained / "mae", tmp_path / "mae", model__mask_ratio=0.5)
    (run_beside,) = read(probe)[0].runs
    assert run_beside.masking == Masking("random", 0.5)
    assert not run_beside.faults


def test_a_run_under_way(trained, tmp_path):
    """No summary, no evaluation, last lines cut short by a kill, a name that is markup; a config that is garbage."""
    half = copy(trained / "mae", tmp_path / "half", name=HOSTILE)
    (half / "summary.json").unlink()
    shutil.rmtree(half / "pictures")
    lines = (half / "metrics.jsonl").read_text().splitlines()
    (half / "metrics.jsonl").write_text(lines[0] + '\n{"step": 4, "lo')
    with (half / "goodput.jsonl").open("a") as file:
        file.write('{"run": 2, "be')
    broken = copy(trained / "mae", tmp_path / "broken")
    (broken / "config.json").write_text("{")
    text = make(tmp_path / "r.html", tmp_path, quick=True)
    check(text)
    assert "2 of 8, unfinished" in text
    assert "&lt;script&gt;alert(" in text
    assert f"{broken}: " in text
    assert "left out (--quick)" in text


def test_nothing_recorded_yet(trained, tmp_path):
    """A run killed in its first seconds has its config and nothing else."""
    (tmp_path / "new").mkdir()
    shutil.copy(trained / "mae" / "config.json", tmp_path / "new")
    text = make(tmp_path / "r.html", tmp_path / "new")
    check(text)
    assert "nothing recorded yet" in text
    assert "checkpoints does not exist" in text
    assert "no checkpoint yet" in text


def test_data_that_are_not_there(trained, tmp_path):
    """The page says which and why; all else is in it."""
    probe = copy(trained / "mae_probe_s0", tmp_path / "p", data__source="tfds", data__name="imagenet2012",
                 data__data_dir=str(tmp_path / "none"))  # fmt: skip
    text = make(tmp_path / "r.html", probe)
    check(text)
    (said,) = re.findall(r"No predictions and features of mae_probe_s0: ([^<]*)", text)
    assert "imagenet2012" in said
    assert "Accuracy of each class" in text


def test_corruptiond_checkpoints(trained, tmp_path):
    """A flipped byte is found, an entry of the quarantine shown; and a picture that is none."""
    corrupted = copy(trained / "mae", tmp_path / "corrupted")
    path = max((corrupted / "checkpoints" / "8" / "state").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    (corrupted / "quarantine").mkdir()
    (corrupted / "quarantine" / "4_20260101T000000.txt").write_text("a <b>bad</b> day\n")
    (corrupted / "pictures" / "step_00000004.png").write_bytes(b"no picture")
    text = make(tmp_path / "r.html", corrupted, quick=True)
    check(text)
    assert "CORRUPTED: " in text
    assert "in quarantine: a &lt;b&gt;bad&lt;/b&gt; day" in text
    assert "step_00000004.png cannot be read" in text


def test_wrong_arguments(tmp_path):
    """Told with what to do."""
    with pytest.raises(StorageFault, match="neither the workdir of a run"):
        make(tmp_path / "r.html", tmp_path)
    with pytest.raises(ConfigError, match="which runs"):
        make(tmp_path / "r.html")


def test_steps_and_epochs():
    """A run under way knows its length from its ledger, or of an older version from its own estimate."""
    run_now = Run(workdir=None, config=default.get_config())  # pyright: ignore[reportArgumentType]
    assert run_now.total_steps is None
    run_now.records = [{"step": 100, "step_secs": 0.5, "eta_secs": 450.0}]
    assert run_now.total_steps == 1000
    assert run_now.steps_per_epoch == 10
    run_now.starts = [{"total_steps": 2000}]
    assert run_now.total_steps == 2000
    assert not run_now.finished


@pytest.mark.parametrize("lowest", [False, True])
def test_accuracies_of_classes_are_of_the_last_evaluation(lowest):
    """Of many classes each evaluation names its own lowest; the picture says so, and none is of an earlier one."""
    config = default.get_config()
    runs = [Run(workdir=None, config=config) for _ in range(2)]  # pyright: ignore[reportArgumentType]
    for run_now, (dog, owl) in zip(runs, ((0.3, 0.5), (0.5, math.nan)), strict=True):
        run_now.records = [
            {"step": 10, "val_top1": 0.5, "val_top1/cat": 0.1, "val_top1/dog": 0.2},
            {"step": 20, "val_top1": 0.6, "val_top1/dog": dog, "val_top1/owl": owl},
            {"step": 30, "loss": 1.0},
        ]
        if lowest:
            run_now.records[1]["val_top1_min"] = dog
    one = Group("mae", "", runs)
    plot = pictures.per_class([one])
    assert plot is not None
    what = "The 5 least accurate classes of each run" if lowest else "Accuracy of each class"
    assert plot.title == f"{what} (val)"
    assert plot.alt == f"{plot.title}. Of mae the least accurate is dog with 40.0 %"
    (axes,) = plot.figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["dog", "owl"]
    assert axes.lines[0].get_xdata() == pytest.approx([40.0, 50.0])


MEASURE = """<!DOCTYPE html><iframe id="f" src="report.html" style="border:0;width:{width}px;height:900px"></iframe>
<pre id="out"></pre><script>
f.onload = () => {{
  const page = f.contentDocument;
  const seen = (element) => element.getBoundingClientRect().width * element.getBoundingClientRect().height > 0;
  out.textContent = JSON.stringify({{
    width: page.documentElement.scrollWidth,
    plots: [...page.querySelectorAll("svg.plot")].filter(seen).length,
    pictures: [...page.images].filter((image) => image.complete && image.naturalWidth > 0).length,
    scrolling: [...page.querySelectorAll(".scroll")].some((box) => box.scrollWidth > box.clientWidth),
    heading: page.querySelector("h1").textContent,
    size: parseFloat(f.contentWindow.getComputedStyle(page.body).fontSize),
  }});
}};
</script>"""


@pytest.mark.long
def test_in_a_browser(whole, tmp_path):
    """Without network it shows all figures, says nothing on its console, and on a phone scrolls downwards only."""
    if not shutil.which("chromium"):
        cure = "no `chromium` to show the report in; on Debian: apt-get install chromium"
        pytest.fail(cure) if "CI" in os.environ else pytest.skip(cure)
    (tmp_path / "report.html").write_text(whole[0], encoding="utf-8")
    (tmp_path / "measure.html").write_text(MEASURE.format(width=390))
    done = subprocess.run(
        [
            "chromium",
            *("--headless", "--hide-scrollbars", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9"),
            *("--allow-file-access-from-files", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"),
            *("--virtual-time-budget=5000", "--dump-dom", (tmp_path / "measure.html").as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r'<pre id="out">(\{.*?\})</pre>', done.stdout)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    measured = json.loads(html.unescape(found.group(1)))
    assert measured["heading"] == "Report on 3 runs"
    assert measured["width"] == 390
    assert measured["scrolling"]  # so it would overflow, were the tables not boxes of their own
    assert measured["pictures"] == 2
    assert measured["plots"] == len(re.findall(r'class="plot[ "]', whole[0]))
    assert measured["size"] == 15  # the style sheet counts
    assert "CONSOLE" not in done.stderr, done.stderr
