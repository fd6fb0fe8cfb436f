"""Parses a command line as the command itself would, in this process and without running it."""

import ast
import contextlib
import importlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from mae_dist import cli, errors
from mae_dist import config as config_lib
from mae_dist.checkpoint import __main__ as checkpoint_command

ROOT = Path(__file__).resolve().parent.parent


def parse(module: str, arguments: Sequence[str]) -> ConfigDict | None:
    """Parses the arguments of `python -m mae_dist.<module>`. Returns the config that they give, if any, validated.

    Raises:
      flags.Error, AttributeError, KeyError, SystemExit: a flag or field that does not exist, or a value that is none.
      ConfigError: a config that cannot work.
    """
    if module == "checkpoint":
        with contextlib.suppress(errors.StorageFault):  # the arguments are right and there is no such workdir
            checkpoint_command.command([*arguments[:-1], f"/nowhere/{arguments[-1]}"])
        return None
    argv = cli.with_config_path([module, *arguments])
    values = _defined(module, argv)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the load_module", DeprecationWarning)  # of config_flags
        values(argv)
    if values["config"].value is not None:
        config_lib.validate(values["config"].value)
    return values["config"].value


def flag_names(module: str) -> set[str]:
    """The flags of a command, without its config's fields."""
    return set(_defined(module, [module]))


def _defined(module: str, argv: Sequence[str]) -> flags.FlagValues:
    """The flags of a command, defined anew: those of the process are of all commands that it has imported."""
    values = flags.FlagValues()
    for name in dict.fromkeys(("cli", module)):
        path = ROOT / "mae_dist" / name
        is_package = path.is_dir()
        code = importlib.import_module(f"mae_dist.{name}{'.__main__' if is_package else ''}")
        namespace = vars(code) | {"values": values, "argv": argv}
        for call in _definitions(path / "__main__.py" if is_package else path.with_suffix(".py")):
            eval(compile(ast.Expression(call), name, "eval"), namespace)
    return values


def _definitions(path: Path) -> Iterator[ast.Call]:
    """The calls in a file that define flags, each told where to."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and "DEFINE_" in node.func.attr:
            extra = "flag_values=values" + (", sys_argv=argv" if node.func.attr == "DEFINE_config_file" else "")
            node.keywords += ast.parse(f"f({extra})", mode="eval").body.keywords  # pyright: ignore
            yield ast.fix_missing_locations(node)
