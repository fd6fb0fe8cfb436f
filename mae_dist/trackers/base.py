"""Interface of an experiment tracker, and the registry of those that `config.trackers` may name.

A tracker of your own is one class, in a module that `config.imports` names:

    @mae_dist.trackers.register("csv")
    class Csv:
        def start(self, run):
            self.path = run.workdir + "/loss.csv"

        def log(self, step, scalars, images):
            with open(self.path, "a") as file:
                print(step, scalars.get("loss"), sep=",", file=file)

        def finish(self, status, summary): ...
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from mae_dist.registry import Registry

if TYPE_CHECKING:
    import numpy as np

SAID = 3  # exit code of a tracker's process that has said why it ends; 1 is Python's own, as of a failed import

# How a start of a run ended; "killed": its process is gone.
Status = Literal["done", "preempted", "interrupted", "failed", "killed"]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as a tracker sees it.

    Attributes:
      id: letters and digits, the same at every start of the run and of no other run.
      name: the last part of `workdir`.
      workdir: absolute, or `gs://…`.
      directory: where the tracker's client may keep files, "" if the workdir is in a bucket.
      config: every field by dotted name.
      tags: words to find the run by.
      last_step: the last step that was logged, by this start or an earlier one; -1 before the first.
    """

    id: str
    name: str
    workdir: str
    directory: str
    config: Mapping[str, Any]
    tags: Sequence[str]
    last_step: int


class Tracker(Protocol):
    """Receives the records of one run, in a process of its own: it may block, raise, or crash.

    It is made without arguments. If it has an attribute `url`, that is reported at the end.
    """

    def start(self, run: Run) -> int | None:
        """Begins or continues the run; called again after a method has raised.

        Returns:
          The last step that the tracker has, -1 without any: later ones are logged. None if it cannot say: then those
          after `run.last_step` are logged, and of a killed process that may be one step twice.
        """
        ...

    def log(self, step: int, scalars: Mapping[str, float], images: Mapping[str, "np.ndarray"]) -> None:
        """Logs one step, in ascending order; images are uint8 (height, width, 3). Either may be empty."""
        ...

    def finish(self, status: Status, summary: Mapping[str, Any]) -> None:
        """Ends this start, and returns when everything is stored; `summary` is summary.json if the run is done."""
        ...


@dataclasses.dataclass(frozen=True)
class Registered:
    """A class of trackers, the package that it imports when it starts ("" for none), and how to install that."""

    make: type[Tracker]
    package: str
    install: str


TRACKERS: Registry[Registered] = Registry("trackers")
_Class = TypeVar("_Class", bound=type[Tracker])


def register(name: str, *, package: str = "", install: str = "") -> Callable[[_Class], _Class]:
    """Decorates a class with the methods of `Tracker`; `config.trackers` may then have `name`.

    Args:
      name: as in the config.
      package: what the class imports when it starts; a run without it is refused.
      install: how to install that, by default with pip.

    Raises:
      ConfigError: another class has the name.
    """

    def add(cls: _Class) -> _Class:
        TRACKERS.add(name, Registered(cls, package, install or f"pip install {package}"), cls)
        return cls

    return add


def faults(names: Sequence[str]) -> Iterator[str]:
    """Yields what is wrong with `config.trackers`, each with the cure."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        yield f"trackers={names!r} must be names in a tuple, such as ('wandb',)"
        return
    for name in names:
        if name not in TRACKERS:
            yield TRACKERS.fault(name)
            continue
        found = TRACKERS.get(name)
        if found.package and not _is_installed(found.package):
            yield f"trackers names {name!r} and its package {found.package} is not installed: {found.install}"
        if found.make.__module__ == "__main__" or "<locals>" in found.make.__qualname__:
            yield (
                f"trackers names {name!r}, a class that no other process can import, and a tracker has a process of "
                "its own: put the class into a module and name that in imports"
            )


def _is_installed(package: str) -> bool:
    """True unless all that has the name is a directory without code, as the `wandb` that W&B makes."""
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # of its parent
        return False
    return found is not None and found.origin is not None
