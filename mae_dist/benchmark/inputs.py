"""The speed of the training input pipeline alone: of a config's, and of PyTorch's on the same records.

Each runs in a process of its own and is stopped, with its workers, while it is not its turn. `mae_dist.benchmark --what
input` prints what comes out.
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mae_dist import config as config_lib
from mae_dist.cpu.cores import num_cores
from mae_dist.data import Dataset, num_readers
from mae_dist.data.from_config import open_dataset, train_batches
from mae_dist.data.sources.tfds import TfdsDataset
from mae_dist.errors import ConfigError, DataFault

_MANY = 1 << 40

Result = dict[str, Any]


class Pipeline:
    """An input pipeline in a process of its own, stopped except during its turns."""

    def __init__(self, name: str, module: str, options: Result):
        self.name = name
        # A group of its own can be stopped as one. If this process dies, the kernel wakes it and hangs up.
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        assert self._process.stdout is not None
        self._say(json.dumps(options))  # not as an argument, which holds 128 KiB: ImageNet's files have long names
        if not self._process.stdout.readline().startswith("ready"):
            raise DataFault(f"{name} ended with code {self._process.wait()} before its first batch; it said why above")
        self._signal(signal.SIGSTOP)

    def run(self, count: int) -> float:
        """Seconds for `count` batches."""
        assert self._process.stdout is not None
        self._signal(signal.SIGCONT)
        self._say(str(count))
        seconds = self._process.stdout.readline()
        self._signal(signal.SIGSTOP)
        if not seconds:
            raise DataFault(f"{self.name} ended with code {self._process.wait()}; it said why above")
        return float(seconds)

    def memory_mib(self) -> Result:
        """Of the process and its workers: the largest peak of one, and all together with what they share once."""
        peaks, total = {}, 0.0
        for process in _group(self._process.pid):
            with contextlib.suppress(OSError):  # it ended meanwhile
                peaks[process] = _kib(process, "status", "VmHWM") / 2**10
                total += _kib(process, "smaps_rollup", "Pss") / 2**10
        workers = [peak for process, peak in peaks.items() if process != self._process.pid]
        main = peaks.get(self._process.pid, 0.0)
        return {"main_peak_mib": main, "worker_peak_mib": max(workers, default=0.0), "total_mib": total}

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._signal(signal.SIGKILL)
        self._process.communicate()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended, as the missing answer tells
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)


def _group(group: int) -> Iterator[int]:
    """The processes of a group, where the system has /proc."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getpgid(int(path.name)) == group:
                yield int(path.name)


def _kib(process: int, file: str, field: str) -> int:
    lines = Path(f"/proc/{process}/{file}").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)


@contextlib.contextmanager
def pipelines(config: ConfigDict, against_torch: bool) -> Iterator[list[Pipeline]]:
    """The config's pipeline and, if asked for, PyTorch's with as many workers (or one for each of our threads)."""
    dataset = open_dataset(config, config.data.train_split)
    opened = [("mae_dist", "mae_dist.benchmark.inputs", json.loads(config_lib.to_json(config)))]
    if against_torch:
        opened.append(("torch", "mae_dist.benchmark.torch_input", _torch_options(config, dataset)))
    with contextlib.ExitStack() as stack:
        started = []
        for arguments in opened:
            started.append(Pipeline(*arguments))
            stack.callback(started[-1].close)
        yield started


def _torch_options(config: ConfigDict, dataset: Dataset) -> Result:
    data = config.data
    crops_only = data.augment == "crop_flip" and not data.randaug_magnitude and data.repeats == 1
    if not isinstance(dataset, TfdsDataset) or not crops_only:
        fields = ("source", "augment", "randaug_magnitude", "repeats", "cache")
        raise ConfigError(
            "--against torch compares decoding and random crops of files, and "
            f"{', '.join(f'data.{name}={data[name]!r}' for name in fields)} is not that; use a data.name of "
            "TFDS and --config.data.source=tfds --config.data.augment=crop_flip --config.data.randaug_magnitude=0 "
            "--config.data.repeats=1 --config.data.cache=stream"
        )
    return {
        "spans": [f"{shard.filename}[{shard.skip}:{shard.skip + shard.take}]" for shard in dataset.shards],
        "image_size": list(config.model.image_size),
        "mode": {1: "L", 3: "RGB", 4: "RGBA"}[config.model.channels],
        "scale": list(config.data.crop_scale),
        "batch_size": config.global_batch_size,
        "num_workers": num_readers(dataset, config.data.num_workers),
    }


def measure(config: ConfigDict, *, against_torch: bool, repeats: int, secs: float) -> Result:
    """Turns of about `secs` seconds; every figure is the median over them."""
    batch_size = config.global_batch_size
    with pipelines(config, against_torch) as subjects:
        counts = [max(1, round(secs / subject.run(2) * 2)) for subject in subjects]
        rates: dict[str, list[float]] = {subject.name: [] for subject in subjects}
        for _ in range(repeats):
            for subject, count in zip(subjects, counts, strict=True):
                rates[subject.name].append(count * batch_size / subject.run(count))
        memory = {subject.name: subject.memory_mib() for subject in subjects}
    own = rates["mae_dist"]
    rate = statistics.median(own)
    cores = min(num_cores(), config.data.num_workers or num_cores())
    result: Result = {
        "what": "input",
        "images_per_sec": rate,
        "images_per_sec_per_core": rate / cores,
        "spread": (max(own) - min(own)) / rate,
        "repeats": repeats,
        "num_workers": config.data.num_workers,
        **memory["mae_dist"],
    }
    if against_torch:
        pairs = [mine / theirs for mine, theirs in zip(own, rates["torch"], strict=True)]
        result["torch_images_per_sec"] = statistics.median(rates["torch"])
        result["ratio"] = statistics.median(pairs)
        result["ratio_spread"] = f"{min(pairs):.3g} to {max(pairs):.3g}"
        result |= {f"torch_{name}": value for name, value in memory["torch"].items()}
    return result


def watch(config: ConfigDict, minutes: float) -> Iterator[Result]:
    """The pipeline alone, minute after minute: whether speed falls or memory grows."""
    with pipelines(config, against_torch=False) as (subject,):
        part_secs = min(60.0, 60 * minutes)
        count = max(1, round(part_secs / 12 / subject.run(2) * 2))
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            images, seconds = 0, 0.0
            while seconds < part_secs:
                seconds += subject.run(count)
                images += count * config.global_batch_size
            past = minutes - (end - time.monotonic()) / 60
            yield {"minutes": round(past, 2), "images_per_sec": images / seconds, **subject.memory_mib()}


def serve(config: ConfigDict) -> None:
    """Takes the first batch, then as many as each line of the input says, and prints the seconds."""
    dataset = open_dataset(config, config.data.train_split)
    rows = np.arange(config.global_batch_size)
    with train_batches(config, dataset, start_step=0, total_steps=_MANY, rows=rows) as batches:
        next(batches)
        print("ready", flush=True)
        for line in sys.stdin:
            began = time.monotonic()
            for _ in range(int(line)):
                next(batches)
            print(time.monotonic() - began, flush=True)


if __name__ == "__main__":
    serve(config_lib.from_json(sys.stdin.readline()))
