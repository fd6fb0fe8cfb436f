"""Random numbers of the data pipeline: pure functions of a seed and a few integers, never of a running state.

Only raw Philox words are used: NumPy keeps those the same for ever, but not `permutation` or `random`, and a resumed
run may have a newer NumPy.
"""

import functools

import numpy as np

# One number per use, so that no two uses of one seed share a stream.
PERMUTATION, AUGMENT, DIGITS, RANDAUGMENT, REGISTERED = 1, 2, 3, 4, 5


def _words(use: int, seed: int, index: int, count: int) -> np.ndarray:
    """Draws uint64 words. # -> (count,)"""
    key = np.array([(use << 56) | (seed & ((1 << 56) - 1)), index], np.uint64)
    return np.random.Philox(key=key).random_raw(count)


def uniforms(use: int, seed: int, index: int, shape: tuple[int, int]) -> np.ndarray:
    """Draws float64 numbers in [0, 1). # -> shape"""
    return (_words(use, seed, index, shape[0] * shape[1]) >> np.uint64(11)).astype(np.float64).reshape(shape) * 2.0**-53


@functools.lru_cache(maxsize=2)  # a batch may span the end of one epoch and the start of the next
def permutation(seed: int, epoch: int, count: int, use: int = PERMUTATION) -> np.ndarray:
    """Draws the order of `count` examples in one epoch, read-only. # -> (count,) int64"""
    order = np.argsort(_words(use, seed, epoch, count), kind="stable")
    order.flags.writeable = False
    return order
