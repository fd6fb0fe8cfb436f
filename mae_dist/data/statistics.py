"""Mean and standard deviation of a data set's pixels, per channel, as `data.mean` and `data.std` take them.

Legend: H height, W width, C channels.
"""

import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from etils import epath
from tqdm import tqdm

from mae_dist.data.dataset import Dataset
from mae_dist.data.sources.cache import cache_root
from mae_dist.errors import DataFault
from mae_dist.storage import write_text_atomically

_AT_ONCE = 16  # images that a thread reads
_LOG = logging.getLogger(__name__)

Stats = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation, C values each


def measure(dataset: Dataset, *, limit: int = 0, max_value: float = 0.0) -> Stats:
    """Measures mean and standard deviation of each channel over the images as a model sees them without augmentation.

    Args:
      dataset: whose images are read; those that cannot be are passed over.
      limit: the most images that are read, evenly spaced; 0: all.
      max_value: the top of uint16's range; 0: 65535.

    Returns:
      Fractions of the range; the deviation of a channel that does not vary is given as 1, by which it can be divided.

    Raises:
      DataFault: no image can be read, or a file is gone.
    """
    count = min(limit or dataset.num_examples, dataset.num_examples)
    rows = np.arange(count) * dataset.num_examples // count
    parts = [rows[start : start + _AT_ONCE] for start in range(0, count, _AT_ONCE)]
    number, mean, squares = 0, np.zeros(()), np.zeros(())  # of pixels; squares: sum of squared deviations from the mean
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(desc="measuring", total=count, disable=None, delay=1) as bar:
        for more, its_mean, its_squares in pool.map(lambda part: _moments(dataset, part), parts):
            if more:  # Chan et al. 1979: sums of squares alone would cancel
                apart, total = its_mean - mean, number + more
                squares = squares + its_squares + apart**2 * (number * more / total)
                number, mean = total, mean + apart * (more / total)
            bar.update(_AT_ONCE)
    if not number:
        raise DataFault(f"of {count} images none can be read: {dataset.fault(int(rows[0]))}")
    top = {"uint8": 255.0, "uint16": max_value or 65535.0}.get(dataset.dtype, 1.0)
    std = np.sqrt(squares / number) / top
    return tuple((mean / top).tolist()), tuple(np.where(std > 0, std, 1.0).tolist())


def _moments(dataset: Dataset, rows: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """Returns the number of pixels, and of each channel mean and sum of squared deviations. # -> (C,), (C,) float64"""
    columns, bad = dataset.read(rows, evaluation=False)
    images = columns["image"][~bad]
    pixels = images.reshape(-1, images.shape[-1]).astype(np.float64)
    if not len(pixels):
        return 0, np.zeros(images.shape[-1]), np.zeros(images.shape[-1])
    mean = pixels.mean(axis=0)
    return len(pixels), mean, ((pixels - mean) ** 2).sum(axis=0)


def load_stats(fingerprint: str, cache_dir: str) -> Stats | None:
    """Returns what was stored for a data set's fingerprint; None if there is nothing that can be read."""
    try:
        stored = json.loads(_path(fingerprint, cache_dir).read_text())
        return tuple(map(float, stored["mean"])), tuple(map(float, stored["std"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def store_stats(fingerprint: str, stats: Stats, cache_dir: str) -> None:
    """Stores what was measured; warns where that is not possible."""
    path = _path(fingerprint, cache_dir)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, json.dumps({"mean": stats[0], "std": stats[1]}))
    except OSError as error:
        _LOG.warning("mean and standard deviation are not kept, %s cannot be written: %s", path, error)


def measured(dataset: Dataset, cache_dir: str, *, limit: int = 2000, max_value: float = 0.0) -> Stats:
    """Returns what is stored for a data set, else measures at most `limit` of its images and stores that."""
    stats = load_stats(dataset.fingerprint, cache_dir)
    if stats is None:
        stats = measure(dataset, limit=limit, max_value=max_value)
        store_stats(dataset.fingerprint, stats, cache_dir)
    return stats


def _path(fingerprint: str, cache_dir: str) -> epath.Path:
    return epath.Path(cache_root(cache_dir)) / "statistics" / f"{fingerprint}.json"
