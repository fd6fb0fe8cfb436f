"""Imports the modules of users that a config names, which register what its other fields name."""

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from mae_dist.errors import ConfigError


def import_modules(names: Sequence[str]) -> None:
    """Imports the modules of `config.imports`, also from the current directory, behind all other places.

    Raises:
      ConfigError: one is not there, or fails.
    """
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"imports={names!r} must be names of modules in a tuple, such as ('my_masks',)")
    directory = os.getcwd() if names else ""
    if names and directory not in sys.path:  # there with `python -m`, not with a console script
        sys.path.append(directory)
    for name in names:
        try:
            importlib.import_module(name)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(_fault(name, error, directory)) from error


def _fault(name: str, error: Exception, directory: str) -> str:
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing is not None and f"{name}.".startswith(f"{missing}."):
        return (
            f"imports names {name!r}, and there is no module {missing!r}; put the directory that holds it on "
            f"PYTHONPATH, or start in that directory instead of in {directory}"
        )
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{last.filename}, line {last.lineno}"
    return f"imports names {name!r}, which fails at {place}: {type(error).__name__}: {error}; correct that file"
