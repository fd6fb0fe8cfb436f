"""Digests of arrays and of files: what a checkpoint was meant to hold, and what was written.

The digest of an array depends on its values and their places, not on how they are split over devices, and is computed
where they are. It is a checksum against faults of disks, memory and copies, not against an adversary.
"""

import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

_CHUNK = 2**22


def _mixed(x: jax.Array) -> jax.Array:
    """A bijection of uint32 that spreads every bit over all (Murmur3's last step)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def _words(x: jax.Array) -> jax.Array:
    """The bits of an array as uint32, one or more per value."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(
        x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    )
    return bits.astype(jnp.uint32)


def _digest(x: jax.Array) -> jax.Array:
    """uint32 (2,): sums modulo 2^32 of words mixed with their places, in any order and so under any sharding."""
    words = _words(x)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):  # the place in the whole array, whoever holds which part
        place = place * jnp.uint32(words.shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    mixed = _mixed(words ^ (place * jnp.uint32(0x9E3779B9)))
    return jnp.stack([jnp.sum(value, dtype=jnp.uint32) for value in (mixed, _mixed(mixed + jnp.uint32(1)))])


def checksum(x: jax.Array) -> jax.Array:
    """uint32 (): half a digest of an array, to be computed within a step."""
    return _digest(x)[0]


@functools.cache
def _compiled(platform: str) -> Any:
    """Digests of groups of arrays of one shape: a program with a third of the operations of one for each array."""
    # A CPU runs it as fast, and compiles it in half the time, without the dearer optimisations.
    options = {"xla_backend_optimization_level": "1"} if platform == "cpu" else None
    return jax.jit(lambda groups: [jax.vmap(_digest)(jnp.stack(group)) for group in groups], compiler_options=options)


def digests(tree: Any) -> dict[str, str]:
    """The digest of every array of a tree by its path, 16 hexadecimal digits each; all processes must take part."""
    tree = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf), tree)
    groups: dict[Any, dict[str, jax.Array]] = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        groups.setdefault((leaf.shape, leaf.dtype, leaf.sharding), {})[name] = leaf
    if not groups:
        return {}
    platform = next(iter(jax.tree.leaves(tree)[0].devices())).platform
    values = jax.device_get(_compiled(platform)([list(group.values()) for group in groups.values()]))
    return {
        name: f"{high:08x}{low:08x}"
        for group, pairs in zip(groups.values(), values, strict=True)
        for name, (high, low) in zip(group, pairs, strict=True)
    }


def files(directory: epath.Path) -> Iterator[epath.Path]:
    """Every file below a directory; nothing if there is none."""
    if directory.is_dir():
        for path in sorted(directory.iterdir()):
            if path.is_dir():
                yield from files(path)
            else:
                yield path


def file_digests(directory: epath.Path) -> dict[str, str]:
    """SHA-256 of every file below `directory` by its path in it.

    Raises:
      OSError: a file cannot be read.
    """
    found = {}
    for path in files(directory):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        found[path.relative_to(directory).as_posix()] = digest.hexdigest()
    return found


def differences(meant: dict[str, str], found: dict[str, str]) -> list[str]:
    """A line for each name that is missing, new or different."""
    lines = [f"{name} is missing" for name in meant.keys() - found.keys()]
    lines += [f"{name} is not of it" for name in found.keys() - meant.keys()]
    lines += [f"{name} is damaged" for name in meant.keys() & found.keys() if meant[name] != found[name]]
    return sorted(lines)
