"""A checksum of an array, computed where it lies."""

import jax
import jax.numpy as jnp

SPREAD = 0x9E3779B9  # an odd number whose multiples spread over all of uint32


def mix(x: jax.Array) -> jax.Array:
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


def mixed_words(x: jax.Array) -> jax.Array:
    """Returns the words of an array, each mixed with its place in the whole array, whoever holds which part."""
    words = _words(x)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        place = place * jnp.uint32(words.shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return mix(words ^ (place * jnp.uint32(SPREAD)))


def sums(mixed: jax.Array, valid: jax.Array | bool = True) -> jax.Array:
    """Returns uint32 (2,): sums modulo 2^32 over the `valid` words, in any order and so under any sharding.

    One reduction makes both. For two of them the compiler would store the mixed words, as large as the array itself.
    """
    zero = jnp.uint32(0)
    both = tuple(jnp.where(valid, words, zero) for words in (mixed, mix(mixed + jnp.uint32(1))))
    axes = tuple(range(mixed.ndim))
    return jnp.stack(jax.lax.reduce(both, (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), axes))


def checksum(x: jax.Array) -> jax.Array:
    """uint32 (): half a digest of an array, to be computed within a step."""
    return jnp.sum(mixed_words(x), dtype=jnp.uint32)
