"""Decodes every image of a data set once, in processes, and names those that do not decode or decode with warnings."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import IO, NamedTuple

import numpy as np
from tqdm import tqdm

from mae_dist.data import workers
from mae_dist.data.dataset import Dataset

_CHUNK = 64  # images that a process checks at a time


class Found(NamedTuple):
    """Names of images, each with the reason.

    Attributes:
      bad: those that do not decode.
      warned: those that decode, of which the decoder says something, as of grey blocks in a corrupted JPEG.
    """

    bad: list[str]
    warned: list[str]


def check(dataset: Dataset, title: str, progress: Callable[[], None] = lambda: None) -> Found:
    """Decodes every image once.

    Args:
      dataset: what to check; picklable.
      title: of the progress bar, which a terminal shows.
      progress: called now and then.
    """
    starts = range(0, dataset.num_examples, _CHUNK)
    found = Found([], [])
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(os.cpu_count(), context, _begin, (dataset,)) as pool,
        tqdm(desc=title, total=dataset.num_examples, unit=" images", disable=None) as bar,
    ):
        for bad, warned in pool.map(_check, starts):
            found.bad.extend(bad)
            found.warned.extend(warned)
            bar.update(min(_CHUNK, dataset.num_examples - bar.n))
            progress()
    return found


_dataset: Dataset
_said: IO[bytes]  # what libraries write to the standard error output


def _begin(dataset: Dataset) -> None:
    """Sets up a process: libjpeg's warnings go to a file, for no library passes them on."""
    global _dataset, _said
    workers.start(0, 0)
    _dataset, _said = dataset, tempfile.TemporaryFile()  # noqa: SIM115
    os.dup2(_said.fileno(), 2)


def _check(start: int) -> Found:
    found = Found([], [])
    for index in range(start, min(start + _CHUNK, _dataset.num_examples)):
        _said.truncate(0)
        _said.seek(0)
        _, bad = _dataset.read(np.array([index]), evaluation=False)
        os.lseek(2, 0, os.SEEK_SET)
        text = os.read(2, 500).decode(errors="replace").strip("\0\n ")
        if bad.any():
            found.bad.append(_dataset.fault(index))
        elif text:
            found.warned.append(f"{_dataset.record_name(index)} ({' '.join(text.splitlines())})")
    return found
