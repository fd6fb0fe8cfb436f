"""Sources of examples: TFDS, CIFAR-10 archives, files of images, digits, procedural shapes, and those users register.

A source is one function, here or in a module of yours that `config.imports` names:

    @mae_dist.data.register_source("mine")
    def open_mine(split, *, image_size, channels, data_dir):
        return ArrayDataset({"image": images, "label": labels}, num_classes=10)
"""

from collections.abc import Callable
from typing import Any, TypeVar

from mae_dist.registry import Registry

Function = TypeVar("Function", bound=Callable[..., Any])

SOURCES: Registry[Callable[..., Any]] = Registry("data.source")


def register_source(name: str) -> Callable[[Function], Function]:
    """Adds a source, for `config.data.source` to name: a decorator of the function that opens a split of it.

    The function takes the split expression, and, after a `*`, what it names of `image_size`, `channels` and the fields
    of `config.data`. It returns a `Dataset` of images uint8 (N, *image_size, channels) and labels int32 (N,), of which
    `ArrayDataset` is the simplest. The same arguments must give the same examples in the same order, in every process.

    Raises:
      ConfigError: another function has the name.
    """

    def add(function: Function) -> Function:
        SOURCES.add(name, function, function)
        return function

    return add
