"""Processes that read batches: room for what they send, their memory, their end."""

import contextlib
import ctypes
import multiprocessing
import os
import shutil
import threading

import numpy as np

from mae_dist.data.dataset import Dataset
from mae_dist.errors import ConfigError

BUFFER = 2  # batches that a worker holds ready
_SHARED_MEMORY = "/dev/shm"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def check_shared_memory(dataset: Dataset, rows: int, num_workers: int) -> None:
    """Raises ConfigError if the workers' batches have no room, for which a bus error would kill them without a word.

    Looks at the workers of this process; what others on this host are about to take is not known here.
    """
    try:
        free = shutil.disk_usage(_SHARED_MEMORY).free
    except OSError:  # a system that has it elsewhere
        return
    columns, _ = dataset.read(np.zeros(1, np.int64))
    batch = rows * sum(column.nbytes for column in columns.values())
    needed = num_workers * (BUFFER + 2) * batch  # one more being made, one being copied out
    if needed > free:
        raise ConfigError(
            f"data.num_workers={num_workers} need {needed / 2**20:.0f} MiB of shared memory for their batches of "
            f"{batch / 2**20:.0f} MiB, and {_SHARED_MEMORY} has {free / 2**20:.0f} MiB free; give it more "
            f"(docker run --shm-size={-(-needed // 2**30)}g), or use fewer workers, or 0: threads of this process"
        )


def start(worker: int, num_workers: int) -> None:
    """Sets up a reading process: it claims no accelerator, keeps its memory level, and ends with its parent."""
    del worker, num_workers
    os.environ["JAX_PLATFORMS"] = "cpu"
    keep_memory_level()
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def keep_memory_level() -> None:
    """Makes glibc map every block of 1 MiB or more by itself, and unmap it when it is freed.

    By default glibc raises that size to the largest block freed so far, and decoded photographs of all sizes fragment
    its heap: a worker grew by 2 MiB a minute. Smaller blocks stay in the heap when they are freed: filling fresh memory
    for each buffer of a crop cost as much as the crop.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 2**20)
        mallopt(_M_TRIM_THRESHOLD, 2**24)


def _exit_with_parent() -> None:
    """Ends this process as soon as the one that started it is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
