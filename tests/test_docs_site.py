"""The pages of docs/: the reference of config fields is of this version, and the site builds without a warning."""

import ast
import importlib.util
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

import mae_dist
from mae_dist import config as config_lib

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """The script that writes the reference of config fields."""
    spec = importlib.util.spec_from_file_location("generate_config_fields", DOCS / "generate_config_fields.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_is_of_this_version(generator):
    stale = "docs/config_fields.md is stale: run `python docs/generate_config_fields.py` and commit the page"
    assert generator.PAGE.read_text(encoding="utf-8") == generator.page(), stale


def test_reference_has_every_field(generator):
    """With the default that the code has, and a meaning."""
    rows = re.findall(r"^\| `([\w.]+)` \| `(.*?)` \| (.*) \|$", generator.page(), re.MULTILINE)
    values = [(name, ast.literal_eval(default)) for name, default, _ in rows]
    defaults = {name: list(value) if isinstance(value, tuple) else value for name, value in values}
    assert defaults == dict(config_lib.flatten(mae_dist.default_config()))
    assert len(rows) == len(defaults)
    assert not [name for name, _, meaning in rows if not meaning.strip()], "fields without a comment in default.py"
    assert max(len(meaning) for _, _, meaning in rows) < 125  # wider cells make a table that nobody can read


def test_reference_has_every_comment(generator):
    """Also those that stand above a field or continue in the next line; none is lost, none is there twice."""
    source = generator.SOURCE.read_text(encoding="utf-8")
    words = Counter(re.findall(r"\w+", " ".join(entry.meaning for entry in generator.entries(source))))
    body = source.partition("def get_config")[2]
    comments = re.findall(r"(?<!['\"])#\s+(.*)", body)
    assert words == Counter(re.findall(r"\w+", " ".join(comments)))
