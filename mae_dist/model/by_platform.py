"""One of several functions, by the platform of the program that it is traced into."""

from collections.abc import Callable
from typing import Any

import jax

_NAMED_ALIKE = ("cpu", "tpu")  # by devices and by lowering; a device "gpu" is lowered for as cuda or rocm


def by_platform(*args: Any, default: Callable[..., Any], **special: Callable[..., Any]) -> Any:
    """`jax.lax.platform_dependent`, of whose functions only one is traced where the mesh says what devices it has.

    Tracing all of them, each as a program of its own, took half of the time that tracing an update takes.

    Args:
      *args: arrays.
      default: what takes them on any other platform.
      **special: what takes them on `cpu`, `tpu`, `cuda` or `rocm`.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None or device.platform not in _NAMED_ALIKE:
        return jax.lax.platform_dependent(*args, **special, default=default)
    return special.get(device.platform, default)(*args)
