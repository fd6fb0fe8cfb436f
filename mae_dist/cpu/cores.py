"""How a computation is carried out on a CPU: into how many devices the cores are split, a batch into how many pieces.

Measured on two cores: a device per core with data parallelism, and pieces whose activations stay in the cache, are
twice as fast as one device and the whole batch. Nothing here touches a TPU or GPU.
"""

import glob
import math
import os
from importlib.util import find_spec
from pathlib import Path

_FLAG = "xla_force_host_platform_device_count"
_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "jax_rocm60_plugin")
_TPU_CHIPS = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")  # libtpu alone is no TPU: it also compiles for absent ones
_EXAMPLES_PER_DEVICE = 16  # fewer, and the exchange of gradients costs more than another device gains
_CACHES = 5.0  # a piece's largest activations may fill the second-level cache so many times; measured best
_TOKENS = 256  # of an update a piece has at least so many: else adding its gradients up costs more than the cache saves
_FEW = 4_000_000  # numbers that code without any optimisation draws in less time than optimising it takes
_HAVE_OLDER_EMITTER = ((0, 10), (0, 11))  # jaxlib: first and first not any more, for an unknown option is an error
_MOST_CACHE = 2**20  # counted on: measured on cores with 2 MiB, pieces of 16 to 32 images stay best, 64 would fill it


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _runs_on_cores() -> bool:
    """Whether JAX will compute on the CPU and nobody said how."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms not in ("", "cpu") or (not platforms and _has_accelerator()):
        return False
    return _FLAG not in os.environ.get("XLA_FLAGS", "")  # whoever set it knows better


def _has_accelerator() -> bool:
    """Whether JAX will find one, as far as can be told without it."""
    if any(find_spec(name) for name in _PLUGINS):
        return True
    return find_spec("libtpu") is not None and any(glob.glob(pattern) for pattern in _TPU_CHIPS)


def num_devices(wanted: int, batches: tuple[tuple[int, int], ...]) -> int:
    """Chooses into how many devices the cores are split; 0 where JAX will not compute on a CPU, or XLA_FLAGS say.

    Args:
      wanted: 0 for a device per core, as far as each gets whole shares of the batches and enough of them.
      batches: (examples, what a device's share of them must be a multiple of).
    """
    if not _runs_on_cores():
        return 0
    if not wanted:
        most = min(num_cores(), min(size for size, _ in batches) // _EXAMPLES_PER_DEVICE)
        whole = (n for n in range(1, most + 1) if all(size % (n * multiple) == 0 for size, multiple in batches))
        wanted = max(whole, default=1)
    return wanted


def options_to_train() -> dict[str, str]:
    """Options with which XLA compiles an update that is as fast, in four fifths of the time."""
    return _unless_given({"xla_backend_optimization_level": "1"})


def options_to_run_once(jaxlib: str, numbers: int) -> dict[str, str]:
    """Options with which XLA compiles a program in half the time, to run slower: for one that draws so many numbers.

    Args:
      jaxlib: its version.
      numbers: drawn by the program, which runs once.
    """
    options = {"xla_backend_optimization_level": "0" if numbers < _FEW else "1"}
    if _HAVE_OLDER_EMITTER[0] <= tuple(map(int, jaxlib.split(".")[:2])) < _HAVE_OLDER_EMITTER[1]:
        options["xla_cpu_use_fusion_emitters"] = "False"  # the newer one compiles every loop as a program of its own
    return _unless_given(options)


def _unless_given(options: dict[str, str]) -> dict[str, str]:
    """Those that the user's XLA_FLAGS say nothing of."""
    given = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in options.items() if name not in given}


def cache_bytes() -> int:
    """Second-level cache of a core that a piece may count on."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return min(_MOST_CACHE, int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]])
    except (OSError, ValueError, KeyError, IndexError):
        return _MOST_CACHE


def num_pieces(examples: int, bytes_per_example: int, summed_tokens: int = 0) -> int:
    """Into how many pieces a device computes its examples: a divisor of `examples`.

    Args:
      examples: of one device in one update or evaluation batch.
      bytes_per_example: largest activations that live at once, see `flops.activation_bytes`.
      summed_tokens: of an example in the encoder, where the pieces' gradients are summed; 0 where there are none.
    """
    ideal = max(1.0, _CACHES * cache_bytes() / bytes_per_example)  # examples in a piece
    least = min(examples, math.ceil(_TOKENS / summed_tokens)) if summed_tokens else 1
    sizes = [size for size in range(least, examples + 1) if examples % size == 0]
    return examples // min(sizes, key=lambda size: abs(math.log(size / ideal)))
