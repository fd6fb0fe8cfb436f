"""Rows of the accelerator's table: training steps of ViT-S to ViT-H in bfloat16, on one device."""

import contextlib
import gc
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from mae_dist.benchmark import inputs, steps
from mae_dist.benchmark.options import NotHere, Options, shape_of
from mae_dist.benchmark.turns import Result, compare
from mae_dist.cpu.cores import num_cores
from mae_dist.errors import ConfigError

_REPEATS = 5
_PHOTO = (375, 500)  # height and width of most images of ImageNet


def _secs(options: Options) -> float:
    """Returns about how long a repeat takes."""
    return 0.05 if options.tiny else 0.6


def by_batch(options: Options, name: str, first: int) -> Iterator[Result]:
    """Measures batches that double from `first` until the memory is full, then goes on with remat=dots and blocks.

    It ends where another batch would take longer than the row may.
    """
    config = shape_of(name, options.tiny)
    batch, most = (8, 16) if options.tiny else (first, 1 << 14)
    end, took = time.monotonic() + 0.9 * options.secs, 0.0
    measured: dict[str, Result] = {}
    for config.model.remat in ("none", "dots", "blocks"):
        while batch <= most:
            began = time.monotonic()
            if began + 1.2 * took > end:
                yield {"stopped": f"by the time of the row, before a batch of {batch}, remat={config.model.remat}"}
                return
            config.global_batch_size = batch
            key = f"remat={config.model.remat} batch={batch}"
            found = _steps(config, _secs(options))
            measured[key] = found or {"full": True}
            yield {"steps": measured}
            if found is None:  # only this size did not fit: the next remat begins with it
                break
            batch *= 2
            took = time.monotonic() - began


def _steps(config: ConfigDict, secs: float) -> Result | None:
    """Returns the speed of training steps without input; None if they do not fit the memory."""
    device = jax.devices()[0]
    before = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    try:
        ours = steps.Ours(config, "train", [device], reads=False)
        summary = compare({"mae_dist": ours}, ours.batch_size, _REPEATS, secs)
        peak, source = ours.peak_flops()
        return {
            "images_per_sec": summary["images_per_sec"],
            "spread": summary["spread"],
            "step_secs": ours.batch_size / summary["images_per_sec"],
            "mfu": summary["images_per_sec"] * ours.flops_per_image / peak,
            "peak_from": source,
            # JAX counts the most since the process began: a size that needs less than one before it has no figure.
            "peak_gib": ours.peak_bytes() / 2**30 if ours.peak_bytes() > before else None,
            "first_step_secs": ours.compile_secs,
        }
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    finally:
        gc.collect()  # arrays are freed before the next size takes its own


def against_hf(options: Options, name: str, batch: int) -> Iterator[Result]:
    """Measures training steps by turns with Hugging Face's, eager and compiled, on the same device."""
    if options.platform not in ("gpu", "cpu"):
        raise NotHere("PyTorch does not run on this device")
    if not (find_spec("torch") and find_spec("transformers")):
        raise NotHere("torch and transformers are not installed")
    config = shape_of(name, options.tiny)
    config.global_batch_size = 8 if options.tiny else batch
    while True:
        try:
            found = steps.measure(config, "train", against_hf=True, repeats=_REPEATS, secs=_secs(options), reads=False)
            break
        except ConfigError as error:  # an installed package has no comparators
            raise NotHere(str(error)) from error
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or config.global_batch_size == 1:
                raise
        config.global_batch_size //= 2
        gc.collect()
    names = ("hf_eager", "hf_compiled")
    yield {
        "batch": config.global_batch_size,
        **found,
        "faults": [f"{name} {found[name]}" for name in names if name in found],
    }


def with_input(options: Options, name: str, batch: int) -> Iterator[Result]:
    """Measures training steps that read JPEGs by turns with those that do not, and the input alone."""
    config = shape_of(name, options.tiny)
    config.global_batch_size = batch = 8 if options.tiny else batch
    folder = Path(options.scratch) / "photos"
    mean_kib = _write_photos(folder, 32 if options.tiny else 1024)
    config.data.update(source="folder", data_dir=str(folder), cache="stream", val_fraction=0.0)
    config.data.num_workers = 0 if num_cores() < 4 else num_cores()
    yield {"batch": batch, "num_workers": config.data.num_workers, "mean_jpeg_kib": mean_kib}
    secs = _secs(options)
    with contextlib.ExitStack() as stack:
        subjects = {}
        for key, reads in (("with_input", True), ("without_input", False)):
            subjects[key] = stack.enter_context(
                contextlib.closing(steps.Ours(config, "train", jax.devices()[:1], reads=reads))
            )
        found = compare(subjects, batch, _REPEATS, secs)
        waited = float(np.median(subjects["with_input"].parts["data_wait"]))
    yield {
        "with_input_images_per_sec": found["images_per_sec"],
        "without_input_images_per_sec": found["without_input_images_per_sec"],
        "ratio": found["ratio"],
        "waiting_for_data": waited,
    }
    alone = inputs.measure(config, against_torch=False, repeats=_REPEATS, secs=secs)
    yield {"input_alone_images_per_sec": alone["images_per_sec"], "input_alone_spread": alone["spread"]}


def _write_photos(folder: Path, count: int) -> float:
    """Writes JPEGs that are as large as photographs, smooth with fine noise; returns their mean size in KiB."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    height, width = _PHOTO
    noise = draw.normal(0, 12, (height, width, 3)).astype(np.float32)
    sizes = []
    for number in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        pixels = np.clip(smooth + np.roll(noise, number * 31, axis=(0, 1)), 0, 255).astype(np.uint8)
        path = folder / f"{number}.jpg"
        Image.fromarray(pixels).save(path, quality=90)
        sizes.append(path.stat().st_size)
    return float(np.mean(sizes)) / 2**10
