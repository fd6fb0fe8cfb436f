"""The mesh of devices: axes data, fsdp and tensor."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from mae_dist.errors import ConfigError

AXES = ("data", "fsdp", "tensor")


def mesh_shape(sizes: dict[str, int], num_devices: int) -> tuple[int, ...]:
    """Returns the sizes of (data, fsdp, tensor) over `num_devices`; one of them may be -1 and takes what is left."""
    shape = [sizes[axis] for axis in AXES]
    named = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise ConfigError(f"{named}: sizes are positive and at most one may be -1 (what is left)")
    fixed = math.prod(size for size in shape if size != -1)
    if -1 in shape:
        if num_devices % fixed:
            raise ConfigError(
                f"{named}: the fixed sizes multiply to {fixed}, which does not divide {num_devices} devices; "
                f"choose sizes whose product divides {num_devices}"
            )
        shape[shape.index(-1)] = num_devices // fixed
    elif fixed != num_devices:
        raise ConfigError(
            f"{named} needs {fixed} devices and there are {num_devices}; set one of them to -1, or make the product "
            f"{num_devices}"
        )
    return tuple(shape)


def make_mesh(sizes: dict[str, int], devices: Sequence[Any]) -> Mesh:
    """Makes a mesh over `devices`, real or abstract, with axes data, fsdp and tensor; `data` spans the TPU slices."""
    return Mesh(mesh_devices(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_devices(sizes: dict[str, int], devices: Sequence[Any]) -> np.ndarray:
    """Arranges `devices` as (data, fsdp, tensor) so that neighbours in the mesh are close to each other.

    If TPU devices belong to several slices, `data` spans the slices and the other axes stay within one: the network
    between slices is far slower than within one. GPUs keep their order, in which `data` is outermost.
    """
    shape, slices = mesh_shape(sizes, len(devices)), num_slices(devices)
    if slices == 1:
        split = devices[0].platform == "tpu"  # a mesh axis may lie along part of a side of the slice
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=split)
    data, each = shape[0], len(devices) // slices
    if data % slices:
        raise ConfigError(
            f"mesh.data={data} is not a multiple of the {slices} slices, which it must span: mesh.fsdp x mesh.tensor "
            f"is {math.prod(shape[1:])} and a slice has {each} devices; make it a divisor of {each}"
        )
    within = (data // slices, *shape[1:])
    return mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True)


def num_slices(devices: Iterable[Any]) -> int:
    """Counts the TPU slices of the devices; 1 for anything but TPUs."""
    return max(1, len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}))
