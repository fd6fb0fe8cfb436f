"""The configs that come with the package, by name."""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

from mae_dist.errors import ConfigError, nearest

_PACKAGE = Path(__file__).resolve().parent.parent
# In an installed package they lie within it, in a checkout beside it.
_DIRECTORIES = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def _directory() -> Path:
    for directory in _DIRECTORIES:
        if (directory / "default.py").is_file():
            return directory
    raise ConfigError(f"the configs are neither in {' nor in '.join(map(str, _DIRECTORIES))}; install mae_dist again")


def names() -> list[str]:
    """Returns the names of all configs, sorted."""
    return sorted(
        path.stem for path in _directory().glob("*.py") if path.stem not in ("__init__", "default", "recipes")
    )


def path(name: str) -> Path:
    """Returns the file of the config called `name`; raises `ConfigError` with the nearest name if there is none."""
    known = ("default", *names())
    if name not in known:
        raise ConfigError(
            f"there is no config named {name!r}.{nearest(name, known)} The names: {', '.join(names())}; or give the "
            "path of a file"
        )
    return _directory() / f"{name}.py"


def get_config(name: str) -> ConfigDict:
    """Returns the config called `name`, such as "cifar_small"; raises `ConfigError` if there is none.

    What follows a colon is the config's own choice, as in "folder:base,224,16".
    """
    name, colon, choice = name.partition(":")
    spec = importlib.util.spec_from_file_location(f"mae_dist_config_{name}", path(name))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(choice) if colon else module.get_config()
