"""A user's folder of images from beginning to end: pretrained without labels, killed, changed, shown."""

import json
import logging
import shutil
import signal
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from ml_collections import ConfigDict

import mae_dist
from mae_dist.data.batches import Stream, stream_indices
from mae_dist.errors import EXIT_PREEMPTED, ConfigError, StorageFault
from tests import trained
from tests.runs import (
    ONLY_UPDATES,
    checkpoint_arrays,
    end_of,
    kill_at_step,
    records,
    run,
    smoke_config,
    start,
    start_processes,
    wait_for_step,
)

RNG = np.random.default_rng(0)


def write_images(root: Path, count: int, *, shape: tuple[int, ...] = (20, 18, 3), dtype: Any = np.uint8) -> Path:
    """Smooth images with noise: something to learn."""
    (root / "holiday").mkdir(parents=True)
    for i in range(count):
        y, x = np.mgrid[: shape[0], : shape[1]]
        level = (np.sin(x / (3 + i % 5)) + np.cos(y / (2 + i % 3)) + 2) / 4
        bands = np.stack([level * (1 + band) / shape[-1] for band in range(shape[-1])], axis=-1)
        image = (np.clip(bands + RNG.normal(0, 0.02, shape), 0, 1) * np.iinfo(dtype).max).astype(dtype)
        path = root / ("holiday" if i % 2 else ".") / f"{i:03d}"
        if shape[-1] == 3:
            cv2.imwrite(f"{path}.png", image)
        else:
            np.save(f"{path}.npy", image)
    return root


def folder_config(root: Path, **overrides: Any) -> ConfigDict:
    """configs/smoke.py on a folder."""
    fields = {
        "data__source": "folder",
        "data__data_dir": str(root),
        "data__cache_dir": str(root.parent / "cache"),
        "data__train_split": "train",
        "data__val_split": "val",
        "data__test_split": "",
        "data__val_fraction": 0.2,
        "total_steps": 6,
        "global_batch_size": 16,
        "log_every_steps": 1,
        "eval__every_steps": 3,
        "online__every_steps": 3,
        "checkpoint__every_steps": 3,
    }
    return smoke_config(**{**fields, **overrides})


def test_a_folder_pretrains_without_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Said once that accuracies are off; health instead; measured scaling; broken files named; the picture drawn."""
    root = write_images(tmp_path / "images", 40)
    for name in ("empty.png", "holiday/text.png", "nonsense.png", "wrong.png", "cut.png"):
        (root / name).write_bytes(b"" if name == "empty.png" else b"no image")
    config = folder_config(root, data__mean=(), data__std=(), data__max_bad_share=0.2)
    with caplog.at_level(logging.INFO):
        result = mae_dist.train(config, tmp_path / "run")
    assert result.status == "done"
    assert caplog.text.count("kNN and ridge accuracy are off") == 1
    found = records(tmp_path / "run")[-1]
    assert {"val_loss", "val_rank", "val_feature_std", "val_dead_share"} <= found.keys()
    assert not {"val_knn_top1", "val_ridge_top1"} & found.keys()
    assert 1 <= found["val_rank"] <= 32
    bad = (tmp_path / "run" / "bad_files.txt").read_text().splitlines()
    assert found["bad_records"] == len(bad)
    assert all("are not a whole image" in line or "is empty or gone" in line for line in bad)
    assert {Path(line.partition(" (")[0]).stem for line in bad} <= {"empty", "text", "nonsense", "wrong", "cut"}
    assert list((tmp_path / "run" / "pictures").glob("*.png"))
    stored = mae_dist.open_run(tmp_path / "run").config
    assert len(stored.data.mean) == len(stored.data.std) == 3
    assert mae_dist.train(config, tmp_path / "run").metrics["loss"] == result.metrics["loss"]  # the same line again


@pytest.mark.long
def test_what_changed_is_refused_by_name_and_accepted_if_asked(tmp_path: Path) -> None:
    """With what was measured before; the examples of now begin with a new epoch, and a third start goes on there."""
    root = write_images(tmp_path / "images", 30)
    config = folder_config(root, data__mean=(), data__std=(), trace=True)
    mae_dist.train(config, tmp_path / "run")
    before = mae_dist.open_run(tmp_path / "run").config.data.mean
    cv2.imwrite(str(root / "new.png"), np.zeros((20, 18, 3), np.uint8))
    (root / "004.png").unlink()
    config.total_steps = 12
    with pytest.raises(StorageFault, match=r"1 added: new\.png; 1 gone: 004\.png.*accept_changes"):
        mae_dist.train(config, tmp_path / "run")
    config.data.accept_changes = True
    assert mae_dist.train(config, tmp_path / "run").step == 12
    assert mae_dist.open_run(tmp_path / "run").config.data.mean == before
    count = mae_dist.build(config).data.train.num_examples
    meta = json.loads((tmp_path / "run" / "checkpoints" / "12" / "meta" / "metadata").read_text())
    assert meta["num_examples"] == count
    assert meta["stream"] == [6, 4]  # 6 steps of 16 images were four epochs of 24 or 25, the last one begun
    # Interrupted in between, it sees the same.
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "12")
    mae_dist.train(config, tmp_path / "again")
    assert records(tmp_path / "again") == records(tmp_path / "run")


def test_other_examples_begin_with_their_next_epoch() -> None:
    stream = Stream().after(10, 16, 50)  # 160 of 50: the fourth epoch was begun
    assert stream == (10, 4)
    seen = np.concatenate([stream_indices(0, step, 16, np.arange(16), 32, stream) for step in (10, 11)])
    assert sorted(seen.tolist()) == list(range(32))
    whole = np.concatenate([stream_indices(0, step, 16, np.arange(16), 32, Stream(0, 4)) for step in (0, 1)])
    np.testing.assert_array_equal(seen, whole)
    assert stream.after(12, 16, 32) == (12, 5)


def test_labels_are_asked_for_where_they_are_needed(tmp_path: Path) -> None:
    root = write_images(tmp_path / "images", 10)
    with pytest.raises(ConfigError, match=r"the data has no labels, and a probe or a fine-tuning"):
        mae_dist.build(folder_config(root, task="finetune"))
    (root / "holiday").rename(tmp_path / "holiday")
    (root / "one").mkdir()
    for path in root.glob("*.png"):
        path.rename(root / "one" / path.name)
    with pytest.raises(ConfigError, match=r"one class only \(one\)"):
        mae_dist.build(folder_config(root, task="finetune", data__labels="folders"))
    with pytest.raises(ConfigError, match=r"keep_best='val_knn_top1' needs labels of two classes"):
        mae_dist.build(folder_config(root, data__labels="folders", checkpoint__keep_best="val_knn_top1"))


@pytest.mark.long
def test_one_class_has_no_accuracy(tmp_path: Path) -> None:
    """By neighbours it would be 1."""
    root = write_images(tmp_path / "one" / "class", 20).parent
    result = mae_dist.train(folder_config(root, data__labels="folders"), tmp_path / "run")
    assert "val_rank" in result.metrics
    assert "val_knn_top1" not in result.metrics


@pytest.mark.long
def test_many_bands_of_many_bits(tmp_path: Path) -> None:
    """13 channels of uint16: trained, interrupted and continued, drawn in the bands chosen, features taken."""
    root = write_images(tmp_path / "images", 24, shape=(20, 18, 13), dtype=np.uint16)
    config = folder_config(
        root,
        model__channels=13,
        data__mean=(),
        data__std=(),
        data__augment="crop_flip",
        data__num_workers=1,
        pictures__channels=(3, 2, 1),
    )
    config.total_steps = 3
    mae_dist.train(config, tmp_path / "run")
    config.total_steps = 6
    mae_dist.train(config, tmp_path / "run")
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert list((tmp_path / "run" / "pictures").glob("*.png"))
    opened = mae_dist.open_run(tmp_path / "run")
    assert opened.config.data.dtype == "uint16"
    images = np.load(root / "000.npy")[None, :16, :16]
    features = opened.encoder().features(images)
    assert features.shape == (1, 32)
    np.testing.assert_allclose(opened.encoder().features(images / np.float32(65535)), features, atol=1e-4)
    drawn = opened.reconstruct(images)
    np.testing.assert_allclose(drawn["original"][0], images[0] / 65535, atol=1e-5)
    assert drawn["reconstruction"].shape == (1, 16, 16, 13)


def test_weights_of_rgb_begin_a_model_of_other_channels(tmp_path: Path) -> None:
    """Asked for: an image of equal channels gives the tokens of before; not asked for: refused with that cure."""
    source = trained.save(tmp_path / "rgb", trained.in_memory())
    root = write_images(tmp_path / "images", 10, shape=(20, 18, 6), dtype=np.uint16)
    rgb = mae_dist.open_run(source).config
    config = folder_config(root, model__channels=6, init_from=str(source))
    with config.unlocked():
        for name in ("image_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio"):
            config.model[name] = rgb.model[name]
    with pytest.raises(StorageFault, match=r"(?s)channels: \d -> 6.*init_inflate=True"):
        mae_dist.build(config).init_state()
    config.init_inflate = True
    kernel = np.asarray(mae_dist.build(config).init_state().params["encoder"]["patch_embed"]["kernel"])
    old = np.asarray(mae_dist.open_run(source).load_params()["encoder"]["patch_embed"]["kernel"])
    width, channels = old.shape[1], rgb.model.channels
    np.testing.assert_allclose(
        kernel.reshape(-1, 6, width).sum(axis=1), old.reshape(-1, channels, width).sum(axis=1), atol=1e-5
    )


ARGS = (
    "--config=configs/smoke.py",
    *(f"--config.data.{field}" for field in ("source=folder", "train_split=train", "val_split=val", "test_split=")),
    "--config.total_steps=40",
    "--config.global_batch_size=16",
    "--config.log_every_steps=1",
    "--config.checkpoint.every_steps=7",
    "--config.data.augment=crop_flip",
    "--config.trace=True",
    *ONLY_UPDATES,
)


@pytest.mark.long
def test_killed_and_on_other_topologies(child_env: Any, tmp_path: Path) -> None:
    """SIGKILL with workers, then two processes, then one: every step saw the same examples under the same masks."""
    root = write_images(tmp_path / "images", 60)
    args = (*ARGS, f"--config.data.data_dir={root}", f"--config.data.cache_dir={tmp_path / 'cache'}")
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    code, output = run(child_env(), *args, f"--workdir={whole}")
    assert code == 0, output
    kill_at_step(start(child_env(), *args, "--config.data.num_workers=2", f"--workdir={workdir}"), workdir, 16)
    code, output = run(child_env(), *args, f"--workdir={workdir}")
    assert code == 0, output
    assert "Continuing from step" in output
    assert records(workdir) == records(whole)
    for a, b in zip(checkpoint_arrays(workdir), checkpoint_arrays(whole), strict=True):
        np.testing.assert_array_equal(a, b)

    workdir = tmp_path / "moved"
    processes = start_processes(child_env(), 2, *args, f"--workdir={workdir}")
    wait_for_step(processes, workdir, 16)
    processes[1].send_signal(signal.SIGTERM)
    assert [code for code, _ in end_of(processes)] == [EXIT_PREEMPTED] * 2
    code, output = run(child_env(), *args, f"--workdir={workdir}")
    assert code == 0, output
    assert [record["trace"] for record in records(workdir)] == [record["trace"] for record in records(whole)]
