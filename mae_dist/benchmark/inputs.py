"""The speed of the training input pipeline alone: of a config's, and of PyTorch's on the same records."""

import contextlib
import json
import sys
import time
from collections.abc import Generator, Iterator, Sequence

import numpy as np
from ml_collections import ConfigDict

from mae_dist import config as config_lib
from mae_dist.benchmark.turns import Child, Result, comparator, compare, num_batches
from mae_dist.cpu.cores import num_cores
from mae_dist.data import Dataset, num_readers
from mae_dist.data.from_config import open_dataset, train_batches
from mae_dist.data.sources.folder import FolderDataset
from mae_dist.data.sources.tfds import TfdsDataset
from mae_dist.errors import ConfigError


@contextlib.contextmanager
def pipelines(config: ConfigDict, against_torch: bool) -> Generator[list[Child]]:
    """Holds the config's pipeline and, if asked for, PyTorch's with as many workers as ours has threads or workers."""
    started: list[tuple[str, Sequence[str], Result]] = [
        ("mae_dist", ("-m", "mae_dist.benchmark.inputs"), json.loads(config_lib.to_json(config)))
    ]
    if against_torch:
        dataset = open_dataset(config, config.data.train_split)
        started.append(("torch", (comparator("torch_input"),), _torch_options(config, dataset)))
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(contextlib.closing(Child(*arguments))) for arguments in started]


def _torch_options(config: ConfigDict, dataset: Dataset) -> Result:
    data = config.data
    crops_only = data.augment == "crop_flip" and not data.randaug_magnitude and data.repeats == 1
    if dataset.dtype != "uint8" or config.model.channels not in (1, 3, 4):
        raise ConfigError(
            f"--against torch: Pillow has no images of {dataset.dtype} with {config.model.channels} channels; measure "
            "without it"
        )
    if not isinstance(dataset, TfdsDataset | FolderDataset) or not crops_only:
        fields = ("source", "augment", "randaug_magnitude", "repeats", "cache")
        raise ConfigError(
            "--against torch compares decoding and random crops of files, and "
            f"{', '.join(f'data.{name}={data[name]!r}' for name in fields)} is not that; use a folder, or a "
            "data.name of TFDS and --config.data.source=tfds --config.data.augment=crop_flip "
            "--config.data.randaug_magnitude=0 --config.data.repeats=1 --config.data.cache=stream"
        )
    if isinstance(dataset, TfdsDataset):
        place = {"spans": [f"{shard.filename}[{shard.skip}:{shard.skip + shard.take}]" for shard in dataset.shards]}
    else:
        place = {"files": [dataset.record_name(index) for index in range(dataset.num_examples)]}
    return {
        **place,
        "image_size": list(config.model.image_size),
        "mode": {1: "L", 3: "RGB", 4: "RGBA"}[config.model.channels],
        "scale": list(config.data.crop_scale),
        "batch_size": config.global_batch_size,
        "num_workers": num_readers(dataset, config.data.num_workers),
    }


def measure(config: ConfigDict, *, against_torch: bool, repeats: int, secs: float) -> Result:
    """Returns speed and memory of the pipelines, by turns of about `secs` seconds."""
    with pipelines(config, against_torch) as children:
        subjects = {child.name: child for child in children}
        summary = compare(subjects, config.global_batch_size, repeats, secs)
        memory = {name: child.memory_mib() for name, child in subjects.items()}
    cores = min(num_cores(), config.data.num_workers or num_cores())
    return {
        "what": "input",
        **summary,
        "images_per_sec_per_core": summary["images_per_sec"] / cores,
        "num_workers": config.data.num_workers,
        **memory["mae_dist"],
        **{f"torch_{name}": value for name, value in memory.get("torch", {}).items()},
    }


def watch(config: ConfigDict, minutes: float) -> Iterator[Result]:
    """Yields the pipeline's speed and memory minute after minute, to show whether one falls or the other grows."""
    with pipelines(config, against_torch=False) as (child,):
        part_secs = min(60.0, 60 * minutes)
        count = num_batches(child, part_secs / 12)
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            images, secs = 0, 0.0
            while secs < part_secs:
                secs += child.run(count)
                images += count * config.global_batch_size
            past = minutes - (end - time.monotonic()) / 60
            yield {"minutes": round(past, 2), "images_per_sec": images / secs, **child.memory_mib()}


def serve(config: ConfigDict) -> None:
    """Takes the first batch, then as many as each line of the input asks for, and prints the seconds."""
    dataset = open_dataset(config, config.data.train_split)
    rows = np.arange(config.global_batch_size)
    with train_batches(config, dataset, start_step=0, total_steps=1 << 40, rows=rows) as batches:
        next(batches)
        print("ready", flush=True)
        for line in sys.stdin:
            began = time.monotonic()
            for _ in range(int(line)):
                next(batches)
            print(time.monotonic() - began, flush=True)


if __name__ == "__main__":
    serve(config_lib.from_json(sys.stdin.readline()))
