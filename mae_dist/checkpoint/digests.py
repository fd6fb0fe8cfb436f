"""Digests of arrays and of files: what a checkpoint was meant to hold, and what was written.

The digest of an array depends on its values and their places, not on how they are split over devices, and is computed
where they are. It is a checksum against faults of disks, memory and copies, not against an adversary.
"""

import functools
import hashlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mae_dist.checkpoint.checksum import SPREAD, mix, mixed_words, sums

_CHUNK_BYTES = 2**22  # of a file
_CHUNK_WORDS = 2**17  # of an array: what is left of the last one is computed for nothing

_compiling = threading.Lock()  # so that no two threads compile the same program


def _sums_of_array(x: jax.Array) -> jax.Array:
    return sums(mixed_words(x))


def _sums_of_chunk(words: jax.Array, start: jax.Array, count: jax.Array) -> jax.Array:
    """Returns what the first `count` of some words, at the places from `start` on, add to an array's sums."""
    index = jax.lax.iota(jnp.uint32, words.size)
    return sums(mix(words ^ ((start + index) * jnp.uint32(SPREAD))), index < count)


@functools.cache
def _array_program(shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding) -> jax.stages.Compiled:
    return jax.jit(_sums_of_array).lower(jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)).compile()


@functools.cache
def _chunk_program(device: Any) -> jax.stages.Compiled:
    here = jax.sharding.SingleDeviceSharding(device)
    words = jax.ShapeDtypeStruct((_CHUNK_WORDS,), jnp.uint32, sharding=here)
    scalar = jax.ShapeDtypeStruct((), jnp.uint32, sharding=here)
    with jax.set_mesh(jax.make_mesh((1,), ("x",), (jax.sharding.AxisType.Auto,), devices=[device])):
        return jax.jit(_sums_of_chunk).lower(words, scalar, scalar).compile()


def _is_seen_by_numpy(x: Any) -> bool:
    """True if the memory of a CPU holds an array, or what has its shape and sharding, whole and as plain numbers."""
    on_cpu = all(device.platform == "cpu" for device in x.sharding.device_set)
    return on_cpu and x.sharding.is_fully_replicated and not jnp.issubdtype(x.dtype, jax.dtypes.extended)


def _program(x: Any) -> jax.stages.Compiled:
    """Returns the program that digests an array, or a chunk of it where NumPy sees it.

    NumPy sees an array of any shape as a line of words, and one small program takes them chunk by chunk. A program for
    each shape would take XLA's CPU compiler longer than all digests take. On an accelerator, or split over devices, an
    array is digested where it lies. Neither kind of program has temporaries that grow with the array.
    """
    with _compiling:
        if not _is_seen_by_numpy(x):
            return _array_program(x.shape, x.dtype, x.sharding)
        return _chunk_program(min(x.sharding.addressable_devices, key=lambda device: device.id))


def _chunks(x: jax.Array) -> Iterator[tuple[np.ndarray, np.uint32, np.uint32]]:
    """Yields an array that NumPy sees as arguments of `_sums_of_chunk`, without copying more than a chunk of it."""
    values = np.asarray(x.addressable_data(0)).reshape(-1)
    if values.dtype != np.bool_:
        values = values.view({1: np.uint8, 2: np.uint16}.get(values.dtype.itemsize, np.uint32))
    for start in range(0, values.size, _CHUNK_WORDS):
        words = values[start : start + _CHUNK_WORDS].astype(np.uint32, copy=False)
        count = words.size
        yield np.pad(words, (0, _CHUNK_WORDS - count)), np.uint32(start % 2**32), np.uint32(count)


def programs(tree: Any) -> list[jax.stages.Compiled]:
    """Returns what `digests` runs for each array of a tree, compiled; shapes with shardings will do.

    Compiling takes seconds where there is a program for each shape: ask ahead, in a thread, and `digests` has them.
    """
    return [_program(leaf) for leaf in jax.tree.leaves(tree)]


def array_name(path: tuple[Any, ...]) -> str:
    """Returns the name of an array by its path in a tree, as Orbax stores it."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def digests(tree: Any) -> dict[str, str]:
    """The digest of every array of a tree by its path, 16 hexadecimal digits each; all processes must take part."""
    parts: dict[str, list[jax.Array]] = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        array = leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
        program, pieces = _program(array), _chunks(array) if _is_seen_by_numpy(array) else [(array,)]
        parts[array_name(path)] = [program(*piece) for piece in pieces]
    return {
        name: "{:08x}{:08x}".format(*sum(sums, np.zeros(2, np.uint32))) for name, sums in jax.device_get(parts).items()
    }


def files(directory: epath.Path) -> Iterator[epath.Path]:
    """Every file below a directory; nothing if there is none."""
    if directory.is_dir():
        for path in sorted(directory.iterdir()):
            if path.is_dir():
                yield from files(path)
            else:
                yield path


def file_digests(directory: epath.Path, is_wanted: Callable[[str], bool] = lambda name: True) -> dict[str, str]:
    """SHA-256 of the files below `directory` by their paths in it, of those whose path is wanted.

    Raises:
      OSError: a file cannot be read.
    """
    found = {}
    for path in files(directory):
        name = path.relative_to(directory).as_posix()
        if is_wanted(name):
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
            found[name] = digest.hexdigest()
    return found


def differences(meant: dict[str, str], found: dict[str, str]) -> list[str]:
    """A line for each name that is missing, new or different."""
    lines = [f"{name} is missing" for name in meant.keys() - found.keys()]
    lines += [f"{name} is not of it" for name in found.keys() - meant.keys()]
    lines += [f"{name} is damaged" for name in meant.keys() & found.keys() if meant[name] != found[name]]
    return sorted(lines)
