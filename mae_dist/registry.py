"""Registries of named functions, which users can add to: the choices of a config's field."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from mae_dist.errors import ConfigError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """The choices of one field of the config, by name, in the order they were added; iterating gives the names."""

    def __init__(self, field: str):
        """Makes an empty registry of the choices of `field`, a dotted name."""
        self.field = field
        self._entries: dict[str, tuple[T, str]] = {}  # with who added it

    def add(self, name: str, entry: T, function: Callable[..., Any]) -> None:
        """Adds an entry, which `function` defines.

        The same function may be added again, as by a notebook's cell or a reloaded module.

        Raises:
          ConfigError: another function has the name.
        """
        owner = f"{function.__module__}.{function.__qualname__}"
        if name in self._entries and self._entries[name][1] != owner:
            raise ConfigError(
                f"{self.field}={name!r} is registered by {self._entries[name][1]} already; {owner} needs another name"
            )
        self._entries[name] = entry, owner

    def get(self, name: str) -> T:
        """Returns the entry called `name`; raises `ConfigError` with the nearest name if there is none."""
        if name not in self._entries:
            raise ConfigError(self.fault(name))
        return self._entries[name][0]

    def fault(self, name: object) -> str:
        """Returns the message that nothing is called `name`, with the cure."""
        cure = nearest(str(name), self) or " If a module of yours registers it, name that module in imports."
        return f"{self.field}={name!r} is not one of {', '.join(self)}.{cure}"

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._entries))

    def __len__(self) -> int:
        return len(self._entries)


def named_arguments(function: Callable[..., Any], offered: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Returns those of `offered` that `function` has keyword-only parameters for, all of them for a `**` parameter.

    Raises:
      ConfigError: it needs one that is not offered; `what` names the function in the message.
    """
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(offered)
    asked = [parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for parameter in asked:
        if parameter.name not in offered and parameter.default is parameter.empty:
            raise ConfigError(
                f"{what} asks for {parameter.name!r}, which is not offered.{nearest(parameter.name, offered)} It may "
                f"name, after a *: {', '.join(offered)}"
            )
    return {parameter.name: offered[parameter.name] for parameter in asked if parameter.name in offered}
