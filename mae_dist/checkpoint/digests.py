"""Digests of arrays and of files: what a checkpoint was meant to hold, and what was written.

The digest of an array depends on its values and their places, not on how they are split over devices, and is computed
where they are. It is a checksum against faults of disks, memory and copies, not against an adversary.
"""

import hashlib
import io
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from mae_dist.storage import children_of

_SPREAD = 0x9E3779B9  # an odd number whose multiples spread over all of uint32
_CHUNK_WORDS = 2**17  # of an array that NumPy digests: they stay in a core's cache

_Words = TypeVar("_Words", jax.Array, np.ndarray)


def _mix(x: _Words) -> _Words:
    """Returns a bijection of uint32 that spreads every bit over all (Murmur3's last step)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * np.uint32(factor)
    return x ^ (x >> 16)


def _mixed_words(x: jax.Array) -> jax.Array:
    """Returns the bits of an array as uint32, each mixed with its place in the whole array, however that is split."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint32)
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        place = place * jnp.uint32(words.shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return _mix(words ^ (place * jnp.uint32(_SPREAD)))


def checksum(x: jax.Array) -> jax.Array:
    """Returns uint32 (): half a digest of an array, to be computed within a step."""
    return jnp.sum(_mixed_words(x), dtype=jnp.uint32)


@jax.jit
def sums_on_devices(x: jax.Array) -> jax.Array:
    """Returns uint32 (2,): sums modulo 2^32, in any order and so under any sharding.

    One reduction makes both. For two of them the compiler would store the mixed words, as large as the array itself.
    """
    mixed, zero = _mixed_words(x), jnp.uint32(0)
    both = (mixed, _mix(mixed + jnp.uint32(1)))
    axes = tuple(range(mixed.ndim))
    return jnp.stack(jax.lax.reduce(both, (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), axes))


def sums_by_numpy(x: np.ndarray) -> np.ndarray:
    """Returns what `sums_on_devices` does, without copying more than a chunk of the array."""
    words = _words_of(x.reshape(-1))
    total = np.zeros(2, np.uint32)
    for start in range(0, words.size, _CHUNK_WORDS):
        part = words[start : start + _CHUNK_WORDS]
        total += _sums_at(part, np.arange(start, start + part.size, dtype=np.uint64).astype(np.uint32))
    return total


def _words_of(values: np.ndarray) -> np.ndarray:
    """Returns the bits of values as unsigned integers of their size, bools as they are."""
    if values.dtype == np.bool_:
        return values
    return values.view({1: np.uint8, 2: np.uint16}.get(values.dtype.itemsize, np.uint32))


def _sums_at(words: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Returns the sums over words that are at these places, uint32, of a whole array."""
    mixed = _mix(words.astype(np.uint32, copy=False) ^ (places * np.uint32(_SPREAD)))
    return np.stack([mixed.sum(dtype=np.uint32), _mix(mixed + np.uint32(1)).sum(dtype=np.uint32)])


def _sums_of_shard(shard: jax.Shard, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the sums over one part of an array of this shape; those of all parts add up to `sums_by_numpy`."""
    values = np.asarray(shard.data)
    places = np.zeros((1,), np.uint32)
    for size, part, count in zip(shape, shard.index, values.shape, strict=True):
        start = part.start or 0
        places = places[..., None] * np.uint32(size) + np.arange(start, start + count, dtype=np.uint32)
    return _sums_at(_words_of(values), places[0])


def _sums_of_parts(array: jax.Array) -> np.ndarray:
    """Returns the sums over those parts of an array that this process counts; those of all processes add up."""
    total = np.zeros(2, np.uint32)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            total += _sums_of_shard(shard, array.shape)
    return total


def digests(tree: PyTree) -> dict[str, str]:
    """Returns the digest of every array of a tree by its path, as Orbax stores it; all processes must take part.

    A digest is 16 hexadecimal digits. NumPy makes those of arrays on CPU devices, each process those of its parts:
    XLA's CPU compiler would take longer for their shapes than NumPy takes for all values, and a program per array can
    be too many at once (see `training.train_step`). Others are digested where they lie.
    """
    sums: dict[str, Any] = {}
    of_parts: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        array = leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
        on_cpu = all(device.platform == "cpu" for device in array.sharding.device_set)
        if not on_cpu or jnp.issubdtype(array.dtype, jax.dtypes.extended):
            sums[name] = sums_on_devices(array)
        elif array.sharding.is_fully_replicated:
            sums[name] = sums_by_numpy(np.asarray(array.addressable_data(0)))
        else:
            sums[name] = _sums_of_parts(array)
            if not array.is_fully_addressable:
                of_parts[name] = sums[name]
    if of_parts:  # in one exchange for all arrays
        of_processes = multihost_utils.process_allgather(np.stack(list(of_parts.values())))
        sums |= dict(zip(of_parts, of_processes.sum(axis=0, dtype=np.uint32), strict=True))
    return {name: "{:08x}{:08x}".format(*pair) for name, pair in jax.device_get(sums).items()}


def files(directory: epath.Path) -> Iterator[epath.Path]:
    """Yields every file below a directory; nothing if there is none."""
    for path in children_of(directory):
        if path.is_dir():
            yield from files(path)
        else:
            yield path


def file_digests(directory: epath.Path, is_wanted: Callable[[str], bool] = lambda name: True) -> dict[str, str]:
    """Returns SHA-256 of the files below `directory` by their paths in it, of those whose path is wanted.

    Raises:
      OSError: a file cannot be read.
    """
    found = {}
    for path in files(directory):
        name = path.relative_to(directory).as_posix()
        if is_wanted(name):
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(cast(io.BufferedReader, file), "sha256").hexdigest()
    return found


def differences(meant: dict[str, str], found: dict[str, str]) -> list[str]:
    """Returns a line for each name that is missing, new or different."""
    lines = [f"{name} is missing" for name in meant.keys() - found.keys()]
    lines += [f"{name} should not be there" for name in found.keys() - meant.keys()]
    lines += [f"{name} is corrupted" for name in meant.keys() & found.keys() if meant[name] != found[name]]
    return sorted(lines)
