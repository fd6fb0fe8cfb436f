"""float32 matmuls by oneDNN, which jaxlib's CPU library contains but XLA does not call by itself.

With AVX-512 oneDNN's matmuls are 1.1 times as fast as XLA's, 1.2 times with a transposed first operand, and 1.5 times
at attention's small sizes. With AVX2 only attention's matmuls over hundreds of tokens gain, 1.25 times, and three times
with a transposed first operand. XLA reaches oneDNN by an undocumented custom call, so it is used only with versions of
jaxlib that are known to have it, after one matmul has given the right result. Programs with such calls cannot be cached
on disk, and compiling them at every start takes ten seconds: small models and the evaluation within a run do without.
"""

import functools
import json
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
    """Chooses the backend, of `BACKENDS`, for a program of `flops_per_image`.

    Several processes use XLA: they run one program, and their cores may differ.
    """
    try:
        features = set(_CPUINFO.read_text().split())
    except OSError:
        features = set()
    worth = any(feature in features and flops_per_image >= least for feature, least in _WORTH.items())
    return "onednn" if worth and jax.process_count() == 1 and has_onednn() else "xla"


@functools.cache
def has_onednn() -> bool:
    """True if this process can call oneDNN, which one matmul tests."""
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
    """Multiplies matrices a (*batch, M, K) and b (*batch, K, N) on a CPU: (*batch, M, N).

    Args:
      a: (*batch, K, M) if it is transposed.
      b: (*batch, N, K) if it is transposed.
      transposed: True for each of a and b that is.
      by_onednn: use oneDNN; XLA computes otherwise, and other dtypes than float32.
    """
    if by_onednn and a.dtype == b.dtype == jnp.float32:
        return _call(a, b, transposed)
    batch = tuple(range(a.ndim - 2))
    contracted = (a.ndim - (2 if transposed[0] else 1), b.ndim - (1 if transposed[1] else 2))
    return jax.lax.dot_general(a, b, (((contracted[0],), (contracted[1],)), (batch, batch)))
