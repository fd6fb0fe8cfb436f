"""Matrix products of float32 by oneDNN, which JAX's library for CPUs holds and XLA does not use of its own accord.

On cores with AVX-512 its products are a tenth faster than XLA's where the first operand is as it is, a fifth where it
is transposed, and half as fast again where they are as small as attention's; with AVX2 only those of attention over
hundreds of tokens are, by a quarter, with a transposed first operand by three (`BUILD.md`). XLA has it under the name
of a custom call, without promises: so it is used only where it was tried, with versions of jaxlib that are known to
have it, after one product has come out right. Programs with such calls cannot be stored, so every start compiles them
again, which takes ten seconds: small models, whose products matter less, do without, and so does evaluation within a
run.
"""

import functools
import json
import math
import platform
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
from absl import logging

BACKENDS = ("onednn", "xla")
_TARGET = "__onednn$matmul"
_KNOWN = ((0, 10), (0, 11))  # first and first not any more: a version that does not know the fields would abort
_WORTH = {"avx512f": 1e8, "avx2": 2e9}  # FLOPs an image: an update of cifar_small 6e7, cifar_medium 3e8, vit_tiny 6e9
NOT_STORED = "Error writing persistent compilation cache entry .*std::bad_alloc"
_CPUINFO = Path("/proc/cpuinfo")


def choose(flops_per_image: float) -> str:
    """What computes products of float32 best here, for a program of so many FLOPs an image: one of `BACKENDS`.

    Several processes run one program, and their cores may differ: XLA.
    """
    worth = flops_per_image >= _least_worth() and jax.process_count() == 1
    return "onednn" if worth and has_onednn() else "xla"


def _least_worth() -> float:
    """FLOPs an image from which it is faster on cores such as these."""
    try:
        has = set(_CPUINFO.read_text().split())
    except OSError:
        has = set()
    return min((least for feature, least in _WORTH.items() if feature in has), default=math.inf)


@functools.cache
def has_onednn() -> bool:
    """Whether this process can call it, found out by one product."""
    version = tuple(int(part) for part in jaxlib.version.__version__.split(".")[:2])
    known = _KNOWN[0] <= version < _KNOWN[1] and sys.platform == "linux" and platform.machine() == "x86_64"
    if not known or jax.default_backend() != "cpu":
        return False
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(12, dtype=np.float32).reshape(4, 3)
    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", NOT_STORED, UserWarning)
            found = np.asarray(jax.jit(functools.partial(_call, transposed=(False, True)))(a, b))
    except jax.errors.JaxRuntimeError as error:
        logging.warning("oneDNN cannot be called: %s", error)
        return False
    if not np.array_equal(found, a @ b.T):
        logging.warning("oneDNN finds %s where %s is right, and is not used.", found, a @ b.T)
        return False
    return True


def _call(a: jax.Array, b: jax.Array, transposed: tuple[bool, bool]) -> jax.Array:
    rows, columns = a.shape[-1 if transposed[0] else -2], b.shape[-2 if transposed[1] else -1]
    options = {"transpose_a": transposed[0], "transpose_b": transposed[1]}
    call = jax.ffi.ffi_call(
        _TARGET,
        jax.ShapeDtypeStruct((*a.shape[:-2], rows, columns), a.dtype),
        custom_call_api_version=1,
        legacy_backend_config=json.dumps({"onednn_matmul_config": options}),
    )
    return call(a, b)


def matmul(a: jax.Array, b: jax.Array, transposed: tuple[bool, bool], by_onednn: bool) -> jax.Array:
    """The products (*batch, M, N) of matrices a (*batch, M, K) and b (*batch, K, N), on a CPU.

    Args:
      a: matrices, (*batch, K, M) where they are transposed.
      b: matrices, (*batch, N, K) where they are transposed.
      transposed: whether a is, whether b is.
      by_onednn: otherwise, and for other types than float32, by XLA.
    """
    if by_onednn and a.dtype == b.dtype == jnp.float32:
        return _call(a, b, transposed)
    batch = tuple(range(a.ndim - 2))
    contracted = (a.ndim - (2 if transposed[0] else 1), b.ndim - (1 if transposed[1] else 2))
    return jax.lax.dot_general(a, b, (((contracted[0],), (contracted[1],)), (batch, batch)))
