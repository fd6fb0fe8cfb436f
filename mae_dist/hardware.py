"""Published figures of chips: memory, bandwidths to memory, neighbours and other slices, and peak FLOP/s.

Each with its source. None: not published. Also looks for accelerators on this machine, without starting JAX.
"""

import dataclasses
import glob
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec

_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "jax_rocm60_plugin")
_TPU_CHIPS = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")  # libtpu alone is no TPU: it also compiles for absent ones
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation.

    hbm_bytes, hbm_bytes_per_sec: memory and its speed, of a JAX device. link_bytes_per_sec: of one link to a
    neighbour, one way. sides, max_chips: of a slice. wraps: a side whose length is a multiple of this is closed to a
    ring; with three sides only if all are, for whole cubes are wired together. dcn_bytes_per_sec: a JAX device's part
    of its host's network card, one way. devices: JAX devices of a chip, which share its links.
    inner_bytes_per_sec: between the devices of a chip, one way.
    """

    hbm_bytes: int
    hbm_bytes_per_sec: float
    link_bytes_per_sec: float
    sides: int
    max_chips: int
    wraps: int
    dcn_bytes_per_sec: float | None
    source: str
    devices: int = 1
    inner_bytes_per_sec: float = 0

    def rings(self, slice_shape: Sequence[int]) -> list[bool]:
        """Returns for each side of a slice whether it is closed to a ring."""
        closed = [size % self.wraps == 0 for size in slice_shape]
        return [all(closed)] * len(closed) if self.sides == 3 else closed


_DOCS = "cloud.google.com/tpu/docs/"
# The documents give the links of a chip together and both ways: 400 GB/s are 4 links of 50 GB/s each way.
CHIPS: dict[str, Chip] = {
    "v4": Chip(32 * _GIB, 1.2e12, 50e9, 3, 4096, 4, None, f"{_DOCS}v4; links: Jouppi et al. 2023 (6 of 50 GB/s)"),
    "v5e": Chip(16 * _GIB, 8.19e11, 50e9, 2, 256, 16, 25e9 / 8, f"{_DOCS}v5e (network: 6.4 Tb/s for 256 chips)"),
    "v5p": Chip(95 * _GIB, 2.765e12, 100e9, 3, 6144, 4, 50e9 / 8, f"{_DOCS}v5p (a pod has 8960 chips)"),
    "v6e": Chip(32 * _GIB, 1.638e12, 100e9, 2, 256, 16, 100e9 / 8, f"{_DOCS}v6e (network: 25.6 Tb/s for 256 chips)"),
    # Ironwood. Each of a chip's two chiplets is a device, with half of the chip's memory; six times a link is between
    # them.
    "tpu7x": Chip(
        *(96 * _GIB, 7.38e12 / 2, 100e9, 3, 9216, 4, 100e9 / 8 / 2),
        f"{_DOCS}tpu7x (of a chip: 192 GiB, 7.38 TB/s, 1.2 TB/s to neighbours, 100 Gb/s of network)",
        devices=2,
        inner_bytes_per_sec=600e9,
    ),
}


def ici_bytes_per_sec(chip: Chip, group: Iterable[Sequence[int]], slice_shape: Sequence[int]) -> float:
    """Returns the bytes per second that can leave a device within its slice when a group of devices exchanges.

    A chip has two links along every side that the group extends along, or one where that side is not a ring. Groups
    that have only one of a chip's devices exchange at the same time, so each has its part of the links.

    Args:
      chip: its generation.
      group: coordinates of the chips of the devices that exchange.
      slice_shape: of the slice, in chips.
    """
    group = [tuple(coords) for coords in group]
    chips = set(group)
    if chip.devices > 1 and len(chips) == 1:
        return chip.inner_bytes_per_sec
    columns = list(zip(*group, strict=True))
    links = 0
    for values, size, ring in zip(columns, slice_shape, chip.rings(slice_shape), strict=False):
        if len(set(values)) > 1:
            links += 2 if ring and len(set(values)) == size else 1
    return max(1, links) * chip.link_bytes_per_sec * min(1, len(group) / len(chips) / chip.devices)


# Dense peak FLOP/s of one JAX device, from the vendors' data sheets (NVIDIA prints twice the dense number, with 2:4
# sparsity). On TPU v2, v3 and 7x a device is one of a chip's two cores; on v4 to v6e it is the chip.
_TPU_PEAK_FLOPS: dict[str, dict[str, float]] = {
    "TPU v2": {"bfloat16": 46e12 / 2},
    "TPU v3": {"bfloat16": 123e12 / 2},
    "TPU v4": {"bfloat16": 275e12},
    "TPU v5 lite": {"bfloat16": 197e12},  # v5e
    "TPU v5e": {"bfloat16": 197e12},
    "TPU v5": {"bfloat16": 459e12},  # v5p
    "TPU v5p": {"bfloat16": 459e12},
    "TPU v6 lite": {"bfloat16": 918e12},  # v6e
    "TPU v6e": {"bfloat16": 918e12},
    "TPU7x": {"bfloat16": 2307e12 / 2},
}
# float32 is the tensor cores' TF32, which JAX uses for float32 matmuls by default, where the device has it.
# Matched by the start of the device's name without "NVIDIA" and "Tesla", the longest first.
_H100_SXM = {"bfloat16": 989e12, "float16": 989e12, "float32": 494e12}
_H100_NVL = {"bfloat16": 835e12, "float16": 835e12, "float32": 417e12}
_A100 = {"bfloat16": 312e12, "float16": 312e12, "float32": 156e12}
_GPU_PEAK_FLOPS: dict[str, dict[str, float]] = {
    "V100-SXM2": {"float16": 125e12, "float32": 15.7e12},  # no bfloat16 and no TF32 units
    "V100-PCIE": {"float16": 112e12, "float32": 14e12},
    "A100": _A100,
    "H100 80GB HBM3": _H100_SXM,
    "H100 PCIe": {"bfloat16": 756e12, "float16": 756e12, "float32": 378e12},
    "H100 NVL": _H100_NVL,
    "H200": _H100_SXM,
    "H200 NVL": _H100_NVL,
    "B200": {"bfloat16": 2250e12, "float16": 2250e12, "float32": 1100e12},
}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Returns the peak FLOP/s of one device, or None if it is unknown: a run then has no MFU rather than a wrong one.

    Args:
      device_kind: `jax.Device.device_kind`, such as "TPU v5 lite" or "NVIDIA A100-SXM4-80GB".
      dtype: the type of matmuls: "bfloat16", "float16" or "float32".
    """
    if device_kind in _TPU_PEAK_FLOPS:
        return _TPU_PEAK_FLOPS[device_kind].get(dtype)
    name = device_kind.removeprefix("NVIDIA ").removeprefix("Tesla ")
    for prefix in sorted(_GPU_PEAK_FLOPS, key=len, reverse=True):
        # The start must end where a word does: "A100" is not "A1000".
        if name.startswith(prefix) and not name[len(prefix) :][:1].isalnum():
            return _GPU_PEAK_FLOPS[prefix].get(dtype)
    return None


_GENERATIONS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


def hbm_bytes(device_kind: str) -> int | None:
    """Returns the memory of one JAX device, or None if it is not published here."""
    generation = _GENERATIONS.get(device_kind)
    return CHIPS[generation].hbm_bytes if generation else None


def has_accelerator() -> bool:
    """True if JAX will find an accelerator, as far as can be known without starting it."""
    if any(find_spec(name) for name in _PLUGINS):
        return True
    return find_spec("libtpu") is not None and any(glob.glob(pattern) for pattern in _TPU_CHIPS)


def keep_libtpu_from_starting() -> None:
    """Sets JAX's platform to the CPU where libtpu is installed without an accelerator, for libtpu would print warnings.

    Processes that this one starts inherit it; a platform that the user chose stays.
    """
    if os.environ.get("JAX_PLATFORMS") or find_spec("libtpu") is None or has_accelerator():
        return
    if any(entry_points(group="jax_plugins")):
        return  # an accelerator of a kind that is not known here
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # it has read the environment
        sys.modules["jax"].config.update("jax_platforms", "cpu")
