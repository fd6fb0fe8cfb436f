"""Batches by step: the batch at step t is a pure function of (seed, t), whichever process computes which rows.

The examples form one endless stream: epoch after epoch, each in an order of its own, with no example dropped and no
partial batch. Row r of step t is at g = t * U + r % U of the stream, epoch g // N, position g % N, where U is
global_batch_size / repeats (Hoffer et al. 2019): each example stands `repeats` times in its batch, U rows apart, so
that neighbours are different examples. So there is no iterator state to save: the step is all of it.

Legend: B global batch, b rows of this process, N examples, H height, W width, C channels.
"""

import gc
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from mae_dist.data import draws, workers
from mae_dist.data.dataset import Dataset
from mae_dist.data.randaugment import RandAugment
from mae_dist.data.transforms import AUGMENTATIONS, CROP_UNIFORMS, Augmentation, RandomCrops, flip_images
from mae_dist.errors import DataFault
from mae_dist.resilience.watchdog import Workers

_MAX_THREADS = 16
_REPLACEMENTS = 100  # unreadable records in a row before a batch is given up
_FRACTION_OVER = 1000  # least denominator of the fraction of unreadable records: one early one is not yet 3 %
_BAD = "bad"  # column of dataset positions found unreadable; `Batches` takes it out
_LOG = logging.getLogger(__name__)

HostBatch = dict[str, np.ndarray]


class Stream(NamedTuple):
    """Where a run took up its current examples: at step 0 in epoch 0, unless they changed between two starts."""

    first_step: int = 0
    first_epoch: int = 0

    def after(self, step: int, num_unique: int, num_examples: int) -> "Stream":
        """Returns the stream of other examples from `step` on: their next epoch, all of it."""
        epochs = -(-(step - self.first_step) * num_unique // num_examples)  # begun
        return Stream(step, self.first_epoch + epochs)


UNCHANGED = Stream()


@dataclass(frozen=True)
class _TrainBatch:
    """Makes the host batch of a step. Picklable: workers are spawned."""

    dataset: Dataset
    crop_scale: tuple[float, float]
    augmentation: Augmentation  # pickled with its function by name, so that a worker imports the user's module
    randaugment: RandAugment | None
    repeats: int
    seed: int
    global_batch_size: int
    rows: np.ndarray  # (b,)
    stream: Stream

    def __call__(self, step: int) -> HostBatch:
        num_unique = self.global_batch_size // self.repeats
        indices = stream_indices(
            self.seed, step, num_unique, self.rows % num_unique, self.dataset.num_examples, self.stream
        )
        augmentation, flip, crops = self.augmentation, None, None
        if augmentation.flip or augmentation.crop:
            numbers = self._uniforms(draws.AUGMENT, step, 1 + CROP_UNIFORMS)
            flip = numbers[:, 0] < 0.5 if augmentation.flip else None
            crops = RandomCrops(numbers[:, 1:], self.crop_scale) if augmentation.crop else None
        batch = self._read(indices, crops)
        if flip is not None:
            flip_images(batch["image"], flip)
        if augmentation.function is not None:
            augmentation.apply(batch["image"], self._uniforms(draws.REGISTERED, step, augmentation.num_uniforms))
        if self.randaugment is not None:
            numbers = self._uniforms(draws.RANDAUGMENT, step, self.randaugment.num_uniforms)
            self.randaugment(batch["image"], numbers)
        return batch

    def _uniforms(self, use: int, step: int, count: int) -> np.ndarray:
        """Draws for the whole global batch, so that a row's numbers do not depend on who computes it. # (b, count)"""
        return draws.uniforms(use, self.seed, step, (self.global_batch_size, count))[self.rows]

    def _read(self, indices: np.ndarray, crops: RandomCrops | None) -> HostBatch:
        """Reads the examples, putting the next readable one in the place of one that is not."""
        batch, bad = self.dataset.read(indices, crops, evaluation=False)
        found_bad = [indices[bad]]
        wanted = indices.copy()
        while bad.any():
            if len(found_bad) > _REPLACEMENTS or self.dataset.max_bad_share == 0:
                names = ", ".join(self.dataset.fault(int(index)) for index in found_bad[0][:10])
                raise DataFault(
                    f"records that do not decode: {names}; data.max_bad_share is {self.dataset.max_bad_share:g}, and "
                    f"at most {_REPLACEMENTS} in a row are passed over. Restore the files, or raise data.max_bad_share"
                )
            rows = np.flatnonzero(bad)
            wanted[rows] = (wanted[rows] + 1) % self.dataset.num_examples
            columns, still_bad = self.dataset.read(wanted[rows], crops and crops.take(rows), evaluation=False)
            for name, column in columns.items():
                batch[name][rows] = column
            found_bad.append(wanted[rows[still_bad]])
            bad = np.zeros(len(indices), bool)
            bad[rows[still_bad]] = True
        batch[_BAD] = np.concatenate(found_bad)
        return batch


@dataclass(frozen=True)
class _EvalBatch:
    """Makes the host batch of a number."""

    dataset: Dataset
    global_batch_size: int
    rows: np.ndarray  # (b,)

    def __call__(self, number: int) -> HostBatch:
        positions = number * self.global_batch_size + self.rows
        real = positions < self.dataset.num_examples
        # Padding reads the last example, so that every batch has one shape, and then weighs nothing.
        batch, bad = self.dataset.read(np.minimum(positions, self.dataset.num_examples - 1))
        batch["index"] = np.where(real, positions, -1).astype(np.int32)
        batch["weight"] = (real & ~bad).astype(np.float32)
        batch[_BAD] = positions[real & bad]
        return batch


class Batches:
    """Iterator of host batches; close it, or use it as a context manager, to end its threads and processes.

    Attributes:
      bad_records: names of the unreadable records met so far, in this process and its workers.
    """

    def __init__(self, batches: grain.IterDataset[HostBatch], dataset: Dataset, num_batches: int, *, num_workers: int):
        self.bad_records: list[str] = []
        self._dataset = dataset
        self._num_left = num_batches
        self._num_read = 0
        self._num_bad = 0
        self._bad_positions: set[int] = set()  # of the dataset, whose names are in bad_records
        # A batch of a worker lies in shared memory, which must be given back before the iterator is closed, while JAX
        # may hold on to the batch for longer.
        self._own = np.array if num_workers else np.asarray
        self._workers = Workers(num_workers)
        self._iterator = iter(batches)

    def __iter__(self) -> Iterator[HostBatch]:
        return self

    def __next__(self) -> HostBatch:
        if self._iterator is None:
            raise ValueError("these batches were closed; call train_batches or eval_batches again")
        # Counted here, because grain's own end of iteration keeps the last shared-memory batches alive in a cycle.
        if not self._num_left:
            raise StopIteration
        self._num_left -= 1
        batch = {name: self._own(column) for name, column in next(self._iterator).items()}
        self._workers.look()
        bad = batch.pop(_BAD)
        self._num_read += len(batch["label"])
        if len(bad):
            self._count(bad)
        return batch

    def _count(self, bad: np.ndarray) -> None:
        self._num_bad += len(bad)
        positions = set(bad.tolist()) - self._bad_positions
        if positions:
            names = {index: self._dataset.fault(index) for index in sorted(positions)}  # reads it again, for the reason
            self._bad_positions |= positions
            self.bad_records += names.values()
            if new := [name for index, name in names.items() if index not in self._dataset.reported]:
                _LOG.warning("passed over %d records that do not decode: %s", len(new), ", ".join(new))
                self._dataset.reported |= positions
        allowed = self._dataset.max_bad_share * max(self._num_read, min(_FRACTION_OVER, self._dataset.total_examples))
        if self._num_bad > allowed:
            raise DataFault(
                f"{self._num_bad} of {self._num_read} records read do not decode, and data.max_bad_share is "
                f"{self._dataset.max_bad_share:g}: {', '.join(self.bad_records[:10])}; restore the files, or raise "
                "data.max_bad_share to pass over such records"
            )

    def close(self) -> None:
        """Ends the threads and processes; may be called again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
            gc.collect()  # grain's iterators are in cycles, and complain if the interpreter's exit finds them alive

    def abandon(self) -> None:
        """Kills the workers, instead of `close`, when the process is to end now: one that hangs is not waited for."""
        self._iterator = None
        self._workers.kill()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def train_batches(
    dataset: Dataset,
    *,
    augment: str = "none",
    crop_scale: tuple[float, float] = (0.2, 1.0),
    randaugment: RandAugment | None = None,
    repeats: int = 1,
    seed: int,
    global_batch_size: int,
    start_step: int,
    total_steps: int,
    rows: np.ndarray,
    num_workers: int,
    stream: Stream = UNCHANGED,
) -> Batches:
    """Iterates over this process's rows of the training batches of steps start_step .. total_steps - 1.

    Args:
      dataset: the examples.
      augment: "none", also for a dataset without images; "flip" (horizontal, half of the rows); "crop_flip" (random
        resized crop, bicubic, and flip); or the name of a registered one.
      crop_scale: smallest and largest area of a random crop as a fraction of the image's.
      randaugment: what follows, for images of 1 or 3 channels.
      repeats: how often an example stands in its global batch, each time augmented otherwise; divides it.
      seed: decides order and augmentation.
      global_batch_size: rows of all processes together, B.
      start_step: first step, e.g. the one after a checkpoint.
      total_steps: where to stop.
      rows: global row numbers this process computes, from `local_rows`. # (b,)
      num_workers: reading processes; 0 reads in threads, one for a dataset in memory and one per core otherwise.
      stream: the step and epoch at which these examples begin.

    Returns:
      Host batches {"image": (b, H, W, C), "label": int32 (b,)}, or the dataset's own columns.

    Raises:
      ConfigError: too little shared memory for the workers.
      DataFault: while iterating, as `Dataset.read`, or when more than max_bad_share of the records are unreadable.
    """
    assert 0 <= start_step <= total_steps, (start_step, total_steps)
    assert global_batch_size % repeats == 0, (global_batch_size, repeats)
    make_batch = _TrainBatch(
        dataset,
        crop_scale,
        AUGMENTATIONS.get(augment),
        randaugment,
        repeats,
        seed,
        global_batch_size,
        np.asarray(rows, np.int64),
        stream,
    )
    return _iterate(dataset, make_batch, start_step, total_steps, num_workers)


def eval_batches(dataset: Dataset, *, global_batch_size: int, rows: np.ndarray) -> Batches:
    """Iterates over this process's rows of one pass in order, the last batch padded: as many on every process.

    Args:
      dataset: the examples.
      global_batch_size: rows of all processes together, B.
      rows: global row numbers this process computes, from `local_rows`. # (b,)

    Returns:
      Host batches {"image": (b, H, W, C), "label": int32 (b,), "index": int32 (b,), "weight": float32 (b,)}, or
      the dataset's own columns with index and weight. index is the position in the dataset, -1 for padding; weight is
      1, or 0 for padding and for unreadable records.

    Raises:
      DataFault: while iterating, as `train_batches`.
    """
    make_batch = _EvalBatch(dataset, global_batch_size, np.asarray(rows, np.int64))
    return _iterate(dataset, make_batch, 0, -(-dataset.num_examples // global_batch_size), num_workers=0)


def stream_indices(
    seed: int, step: int, num_unique: int, rows: np.ndarray, num_examples: int, stream: Stream = UNCHANGED
) -> np.ndarray:
    """Returns the examples at `rows` of the `num_unique` different ones that `step` takes. # (b,) -> (b,) int64"""
    epochs, positions = np.divmod((step - stream.first_step) * num_unique + rows, num_examples)
    epochs += stream.first_epoch
    indices = np.empty(len(rows), np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = draws.permutation(seed, int(epoch), num_examples)[positions[here]]
    return indices


def _iterate(dataset: Dataset, make_batch: Any, start: int, stop: int, num_workers: int) -> Batches:
    """Iterates over the batches of the steps start .. stop - 1, made ahead of their use."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads its flags, which nobody parses when we are used as a library
    num_threads = 0 if num_workers else num_readers(dataset, 0)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(2, num_threads) if num_threads else 0)
    batches = grain.MapDataset.range(start, stop).map(make_batch).to_iter_dataset(options)
    if num_workers:
        workers.check_shared_memory(dataset, len(make_batch.rows), num_workers)
        processes = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=workers.BUFFER)
        batches = batches.mp_prefetch(processes, worker_init_fn=workers.start)
    return Batches(batches, dataset, stop - start, num_workers=num_workers)


def num_readers(dataset: Dataset, num_workers: int) -> int:
    """Returns the number of batches made at once: one per worker, or per thread of this process without workers."""
    if num_workers:
        return num_workers
    if dataset.in_memory:
        return 1  # enough to overlap the step; several would share one interpreter lock
    return min(_MAX_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
