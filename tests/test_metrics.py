"""metrics.jsonl over restarts and faults, TensorBoard events read back, throughput, summary; all without TensorFlow."""

import json
import math
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto import event_pb2

from configs import smoke
from mae_dist import config as config_lib
from mae_dist import storage
from mae_dist.errors import StorageFault
from mae_dist.metrics.recorder import Recorder, read_metrics
from mae_dist.metrics.summary import environment, write_summary
from mae_dist.metrics.tensorboard import TensorBoardWriter
from mae_dist.metrics.throughput import Throughput
from mae_dist.resilience.watchdog import Watchdog
from mae_dist.training.summary import finish


def _record(workdir: epath.Path, start_step: int, steps: range, loss: float = 0.5) -> None:
    with Recorder(workdir, start_step=start_step, is_primary=True) as recorder:
        for step in steps:
            recorder.write_scalars(step, {"loss": loss + step})
            recorder.commit(step)


def _events(logdir: epath.Path) -> list:
    """All events of all files, oldest file first (TFRecord framing: length, crc, bytes, crc)."""
    events = []
    for file in sorted(logdir.glob("events*")):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            events.append(event_pb2.Event.FromString(data[12 : 12 + length]))  # pyright: ignore[reportAttributeAccessIssue]
            data = data[16 + length :]
    return events


def test_nothing_imports_tensorflow(child_env):
    program = """
import sys
from mae_dist.metrics import recorder
from mae_dist.metrics.tensorboard import metric_writers
import clu.metrics
assert metric_writers.AsyncMultiWriter
assert "tensorflow" not in sys.modules
try:
    metric_writers.SummaryWriter("x")
except NotImplementedError as error:
    assert "TensorBoardWriter" in str(error)
"""
    subprocess.run([sys.executable, "-c", program], env=child_env(), check=True, timeout=120)


def test_one_line_per_step_with_everything_written_for_it(workdir: epath.Path):
    with Recorder(workdir, start_step=0, is_primary=True) as recorder:
        recorder.write_scalars(10, {"loss": float(np.float32(0.1)), "images": 640})
        recorder.write_scalars(10, {"val_loss": 0.25, "bad": math.nan})
        recorder.commit(10)
        recorder.commit(11)  # nothing to record
        # On disk before close: a checkpoint of the same step may be written now.
        (line,) = (workdir / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "step": 10,
        "loss": float(np.float32(0.1)),
        "images": 640,
        "val_loss": 0.25,
        "bad": None,
    }
    (record,) = read_metrics(workdir)
    assert record["images"] == 640
    assert math.isnan(record["bad"])


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_round_trip_exactly(tmp_path_factory: pytest.TempPathFactory, value: float):
    workdir = epath.Path(tmp_path_factory.mktemp("floats"))
    line = json.dumps({"step": 1, "x": value, "narrow": float(np.float32(1e-3))})
    (workdir / "metrics.jsonl").write_text(line + "\n")
    (record,) = read_metrics(workdir)
    assert record["x"] == value
    assert np.float32(record["narrow"]) == np.float32(1e-3)


def test_restart_leaves_the_file_of_an_uninterrupted_run(workdir: epath.Path, tmp_path: Path):
    _record(workdir, 0, range(1, 8))
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    _record(workdir, 5, range(6, 11))  # the checkpoint was at step 5
    whole = epath.Path(tmp_path / "whole")
    _record(whole, 0, range(1, 11))
    assert (workdir / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert [record["step"] for record in read_metrics(workdir)] == list(range(1, 11))


def test_file_with_nothing_to_drop_is_not_touched(workdir: epath.Path):
    _record(workdir, 0, range(1, 4))

    def written() -> tuple[int, int]:
        found = Path(workdir / "metrics.jsonl").stat()
        return found.st_ino, found.st_mtime_ns

    before = written()
    with Recorder(workdir, start_step=3, is_primary=True) as recorder, pytest.raises(AssertionError, match="already"):
        recorder.commit(3)
    assert written() == before


def test_run_lost_before_its_first_checkpoint_begins_anew(workdir: epath.Path):
    _record(workdir, 0, range(4))
    _record(workdir, 0, range(2), loss=7.0)
    assert read_metrics(workdir) == [{"step": 0, "loss": 7.0}, {"step": 1, "loss": 8.0}]


@pytest.mark.parametrize("tail", ["", '{"step": 3, "loss"', "\0\0\0\0", '{"step": 3}'])
def test_last_line_without_its_end(workdir: epath.Path, tail: str):
    workdir.mkdir()
    (workdir / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n' + tail)
    assert len(read_metrics(workdir)) == (3 if tail.endswith("}") else 2)  # a whole record is kept
    with Recorder(workdir, start_step=9, is_primary=True):
        pass
    assert (workdir / "metrics.jsonl").read_text().endswith("}\n")


@pytest.mark.parametrize("broken", ["", "42", '{"loss": 1.0}', "not json"])
def test_corruption_elsewhere_names_file_and_line(workdir: epath.Path, broken: str):
    workdir.mkdir()
    (workdir / "metrics.jsonl").write_text(f'{{"step": 1}}\n{broken}\n{{"step": 3}}\n')
    with pytest.raises(StorageFault, match=r"metrics\.jsonl, line 2 is no record"):
        read_metrics(workdir)
    with pytest.raises(StorageFault, match="line 2"):
        Recorder(workdir, start_step=3, is_primary=True)


def test_step_is_recorded_at_most_once(workdir: epath.Path):
    with Recorder(workdir, start_step=0, is_primary=True) as recorder:
        recorder.write_scalars(1, {"loss": 1.0})
        with pytest.raises(AssertionError, match="written twice"):
            recorder.write_scalars(1, {"loss": 1.0})
        with pytest.raises(AssertionError, match="not committed"):
            recorder.write_scalars(2, {"loss": 1.0})
        recorder.commit(1)
        with pytest.raises(AssertionError, match="already recorded"):
            recorder.commit(1)


def test_other_processes_write_nothing(workdir: epath.Path):
    with Recorder(workdir, start_step=0, is_primary=False) as recorder:
        recorder.write_scalars(1, {"loss": 1.0})
        recorder.write_images(1, {"x": np.zeros((1, 4, 4, 3))})
        recorder.commit(1)
    assert not workdir.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full (Linux)")
def test_full_disk_is_a_storage_fault(workdir: epath.Path):
    with Recorder(workdir, start_step=0, is_primary=True) as recorder:
        Path(workdir / "metrics.jsonl").symlink_to("/dev/full")
        recorder.write_scalars(1, {"loss": 1.0})
        with pytest.raises(StorageFault, match=r"metrics\.jsonl: .*No space left.*free some space"):
            recorder.commit(1)


def test_workdir_that_cannot_be_made_is_a_storage_fault(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFault, match=r"run/metrics\.jsonl"):
        Recorder(epath.Path(tmp_path / "file" / "run"), start_step=0, is_primary=True)


def test_fault_of_the_background_writer_is_a_storage_fault(workdir: epath.Path):
    with Recorder(workdir, start_step=0, is_primary=True) as recorder:
        recorder.write_images(1, {"x": np.zeros((1, 4, 4, 3), np.uint8)})
    with (
        pytest.raises(StorageFault, match="tensorboard"),
        Recorder(workdir, start_step=0, is_primary=True) as failing,
    ):
        failing.write_images(2, {"x": np.zeros((4, 4))})  # no image: the background thread raises


def test_error_of_the_run_is_not_hidden_by_closing(workdir: epath.Path):
    def run() -> None:
        with Recorder(workdir, start_step=0, is_primary=True) as recorder:
            recorder.write_images(2, {"x": np.zeros((4, 4))})  # closing will raise StorageFault
            raise KeyError("the run")

    with pytest.raises(KeyError, match="the run"):
        run()


def test_close_leaves_no_thread(workdir: epath.Path):
    before = threading.active_count()
    _record(workdir, 0, range(1, 3))
    assert threading.active_count() == before


def test_bucket_objects_are_rewritten_whole(workdir: epath.Path, monkeypatch: pytest.MonkeyPatch):
    workdir.mkdir()
    monkeypatch.setattr(storage, "is_local", lambda path: False)
    (workdir / "metrics.jsonl").write_text('{"step": 1}\n')
    lines = storage.JsonLines(workdir / "metrics.jsonl", dict, "record")
    lines.append({"step": 2})
    assert [record["step"] for record in read_metrics(workdir)] == [1, 2]


def test_tensorboard_events(workdir: epath.Path):
    writer = TensorBoardWriter(workdir, purge_step=7)
    writer.write_scalars(7, {"loss": 0.5, "bad": math.nan})
    writer.write_images(8, {"two": np.ones((2, 4, 6, 3), np.uint8), "one": np.zeros((1, 4, 6, 1), np.uint8)})
    with pytest.raises(NotImplementedError, match="scalars and images only"):
        writer.write_videos(9, {})
    writer.close()
    events = _events(workdir)
    assert events[0].file_version == "brain.Event:2"
    assert (events[1].session_log.status, events[1].step) == (1, 7)  # START: TensorBoard drops steps 7 and later
    values = {value.tag: (event.step, value) for event in events for value in event.summary.value}
    assert values["loss"][0] == 7
    assert values["loss"][1].simple_value == 0.5
    assert math.isnan(values["bad"][1].simple_value)
    assert values.keys() == {"loss", "bad", "two/0", "two/1", "one"}
    image = values["two/1"][1].image
    assert (image.height, image.width) == (4, 6)
    assert image.encoded_image_string.startswith(b"\x89PNG")


def test_recorder_purges_tensorboard_beyond_the_checkpoint(workdir: epath.Path):
    _record(workdir, 0, range(1, 4))
    _record(workdir, 2, range(3, 5))  # in the same second: must not write over the first file
    files = list((workdir / "tensorboard").glob("events*"))
    assert len(files) == 2
    starts = [event.step for event in _events(workdir / "tensorboard") if event.session_log.status == 1]
    assert sorted(starts) == [0, 3]


class _Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rates_are_of_the_training_steps_alone():
    """In a run whose phases last as the clock here says; the remaining time counts the pauses there were so far."""
    clock = _Clock()
    watchdog = Watchdog(**smoke.get_config().deadlines, clock=clock)
    throughput = Throughput(
        images_per_step=64, total_steps=100, flops_per_image=1e9, peak_flops=1e12, account=watchdog.account
    )

    def spend(phase: str, secs: float) -> None:
        with watchdog.during(phase):
            clock.now += secs

    for phase in ("start", "restore", "data", "compile"):
        spend(phase, 30)
    throughput.start(1)
    assert throughput.log(1) == {}
    for _ in range(4):
        spend("data", 0.125)
        spend("step", 0.375)
    rates = throughput.log(5)
    assert rates == pytest.approx(
        {"images_per_sec": 128.0, "step_secs": 0.5, "data_wait": 0.25, "eta_secs": 47.5, "mfu": 0.128}
    )
    for phase in ("evaluate", "checkpoint", "profile", "step"):
        spend(phase, 1.0)
    rates = throughput.log(6)
    assert (rates["step_secs"], rates["data_wait"]) == pytest.approx((1.0, 0.0))  # each window starts anew
    assert rates["eta_secs"] == pytest.approx(94 * (1.0 + 3 / 5))


def test_throughput_of_an_unknown_device_has_no_mfu():
    account = {"step": 1.0, "data": 1.0}
    throughput = Throughput(
        images_per_step=1, total_steps=2, flops_per_image=1e9, peak_flops=None, account=lambda: account
    )
    throughput.start(1)
    assert throughput.log(2).keys() == {"images_per_sec", "step_secs", "data_wait", "eta_secs"}


def test_summary_names_the_lowest_classes_of_the_last_evaluation_alone(workdir: epath.Path):
    """Each evaluation records others: those of an earlier one say nothing of the model that there is in the end."""
    config = smoke.get_config()
    job: Any = SimpleNamespace(config=config, schedule=config_lib.schedule(config, 512))
    with Recorder(workdir, start_step=0, is_primary=True) as recorder:
        for step, scalars in (
            (10, {"loss": 3.0, "val_top1_min": 0.1, "val_top1/cat/a": 0.1, "val_top1/dog": 0.2}),
            (20, {"val_top1_min": 0.3, "val_top1/dog": 0.3, "val_top1/owl": 0.4, "test_top1/cat/a": 0.5}),
            (21, {"loss": 2.0}),
        ):
            recorder.write_scalars(step, scalars)
            recorder.commit(step)
    result = finish(job, workdir, 20)
    summary = json.loads((workdir / "summary.json").read_text())
    found = {name: value for name, value in summary.items() if "loss" in name or "top1" in name}
    expected = {"loss": 2.0, "val_top1_min": 0.3, "val_top1/dog": 0.3, "val_top1/owl": 0.4, "test_top1/cat/a": 0.5}
    assert found == expected
    assert result.metrics.items() >= expected.items()


def test_summary_is_written_whole(workdir: epath.Path):
    workdir.mkdir()
    write_summary(workdir, {"top1": 0.5, "best": {"loss": float("inf"), "steps": 2}})
    assert json.loads((workdir / "summary.json").read_text()) == {"top1": 0.5, "best": {"loss": None, "steps": 2}}
    write_summary(workdir, {"top1": 0.75, **environment()})
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["top1"] == 0.75
    assert (summary["platform"], summary["device_count"], summary["process_count"]) == ("cpu", 8, 1)
    assert summary["jax"].count(".") >= 2
    assert [path.name for path in workdir.iterdir()] == ["summary.json"]
