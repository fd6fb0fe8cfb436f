"""Splits a CPU's cores into devices and a batch into microbatches, and chooses XLA's options.

Measured on two cores: one device per core with data parallelism, and microbatches whose activations stay in the cache,
are twice as fast as one device and the whole batch. Nothing here touches a TPU or GPU.
"""

import math
import os
from pathlib import Path

from mae_dist import hardware

NUM_DEVICES_FLAG = "xla_force_host_platform_device_count"
_EXAMPLES_PER_DEVICE = 16  # with fewer, exchanging gradients costs more than another device gains
_CACHES = 5.0  # a microbatch's largest activations, in sizes of the second-level cache; measured best
_TOKENS = 256  # least in a microbatch of a training step: with fewer, summing gradients costs more than the cache saves
_FEW = 4_000_000  # random numbers that unoptimised code draws in less time than optimising it would take
_HAVE_OLDER_EMITTER = ((0, 10), (0, 11))  # jaxlib versions from, below: an unknown option is an error
_MOST_CACHE = 2**20  # on cores with 2 MiB, microbatches of 16 to 32 images are still best; 64 would fill the cache


def num_cores() -> int:
    """Counts the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_devices(wanted: int, batches: tuple[tuple[int, int], ...]) -> int:
    """Chooses the number of devices for the cores; 0 if JAX will not use the CPU, or XLA_FLAGS give a number.

    Args:
      wanted: the number, or 0 for one device per core, fewer where the batches do not divide or are too small.
      batches: (examples, required divisor of a device's number of them).
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    on_cpu = platforms == "cpu" or (not platforms and not hardware.has_accelerator())
    if not on_cpu or NUM_DEVICES_FLAG in os.environ.get("XLA_FLAGS", ""):  # whoever set it knows better
        return 0
    if not wanted:
        most = min(num_cores(), min(size for size, _ in batches) // _EXAMPLES_PER_DEVICE)
        whole = (n for n in range(1, most + 1) if all(size % (n * multiple) == 0 for size, multiple in batches))
        wanted = max(whole, default=1)
    return wanted


def instruction_sets() -> str:
    """Returns the names of the instruction sets of this machine's CPU; "" where the system does not tell them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def options_to_train() -> dict[str, str]:
    """Returns XLA options that compile the training step in four fifths of the time; the step is as fast."""
    return _unless_given({"xla_backend_optimization_level": "1"})


def options_to_run_once(jaxlib: str, numbers: int) -> dict[str, str]:
    """Returns XLA options that compile in half the time a program that runs once, and so may run slower.

    Args:
      jaxlib: its version.
      numbers: how many random numbers the program draws.
    """
    options = {"xla_backend_optimization_level": "0" if numbers < _FEW else "1"}
    if _HAVE_OLDER_EMITTER[0] <= tuple(map(int, jaxlib.split(".")[:2])) < _HAVE_OLDER_EMITTER[1]:
        options["xla_cpu_use_fusion_emitters"] = "False"  # the newer one compiles every loop as a program of its own
    return _unless_given(options)


def _unless_given(options: dict[str, str]) -> dict[str, str]:
    """Leaves out the options that the user's XLA_FLAGS set."""
    given = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in options.items() if name not in given}


def cache_bytes() -> int:
    """Returns the bytes of a core's second-level cache that a microbatch may count on."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return min(_MOST_CACHE, int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]])
    except (OSError, ValueError, KeyError, IndexError):
        return _MOST_CACHE


def num_pieces(examples: int, bytes_per_example: int, summed_tokens: int = 0) -> int:
    """Chooses the number of microbatches of a device's examples: a divisor of `examples`.

    Args:
      examples: of one device in one training step or evaluation batch.
      bytes_per_example: the largest activations that live at once, see `flops.activation_bytes`.
      summed_tokens: an example's tokens in the encoder if gradients are accumulated; 0 without gradients.
    """
    ideal = max(1.0, _CACHES * cache_bytes() / bytes_per_example)  # examples in a microbatch
    least = min(examples, math.ceil(_TOKENS / summed_tokens)) if summed_tokens else 1
    sizes = [size for size in range(least, examples + 1) if examples % size == 0]
    return examples // min(sizes, key=lambda size: abs(math.log(size / ideal)))
