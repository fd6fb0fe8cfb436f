"""The rows of the global batch that this process reads, and the global array that they become.

Legend: B global batch, b rows of this process.
"""

from typing import Any

import jax
import numpy as np


def local_rows(sharding: jax.sharding.Sharding, global_batch_size: int) -> np.ndarray:
    """Returns the rows whose shards live on this process's devices, sorted. # -> (b,) int64

    Derived from the sharding and not from the process number: where a model axis spans processes, several of them hold
    the same rows, and each reads them.

    Args:
      sharding: of the batch; shards dimension 0 only.
      global_batch_size: B.
    """
    indices = sharding.addressable_devices_indices_map((global_batch_size,)).values()
    parts = [np.arange(global_batch_size)[index] for index in indices if index is not None]
    return np.unique(np.concatenate(parts)).astype(np.int64)


def to_global(
    host_batch: dict[str, np.ndarray], sharding: jax.sharding.Sharding, global_batch_size: int, rows: np.ndarray
) -> dict[str, jax.Array]:
    """Puts this process's rows on its devices.

    Args:
      host_batch: columns of this process's rows. # (b, ...)
      sharding: of the batch; shards dimension 0 only.
      global_batch_size: B.
      rows: what `local_rows` gave. # (b,)

    Returns:
      Global arrays sharded over their first dimension. # (B, ...)
    """
    rows = np.asarray(rows)

    def place(column: np.ndarray) -> jax.Array:
        assert len(column) == len(rows), (column.shape, rows.shape)

        def shard(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(global_batch_size)
            first = int(np.searchsorted(rows, start))  # a shard's rows are consecutive, so they are in `rows` too
            assert np.array_equal(rows[first : first + stop - start], np.arange(start, stop)), (start, stop, rows)
            return column[first : first + stop - start]

        return jax.make_array_from_callback((global_batch_size, *column.shape[1:]), sharding, shard)

    # The one place where data is meant to go to the devices: the guard of the training loop is for all others.
    with jax.transfer_guard_host_to_device("allow"):
        return {name: place(column) for name, column in host_batch.items()}
