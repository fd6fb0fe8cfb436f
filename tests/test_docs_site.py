"""The pages of docs/: the reference of config fields is of this version, and the site builds without a warning."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
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


def build(clone: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]  # --quiet forgives all
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.long
def test_site(tmp_path):
    """Builds without a warning, as it is and with a page whose links leave docs/; a broken link is refused."""
    clone = tmp_path / "clone"
    for name in ("docs", "results"):
        shutil.copytree(ROOT / name, clone / name)
    for name in ("mkdocs.yml", "README.md", "BUILD.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    (clone / "docs/sub").mkdir()
    (clone / "docs/sub/links.md").write_text(
        "[fields](../config_fields.md#data) [guide](../../BUILD.md#tests) [results](../../results/README.md)\n"
        "[licence](../../LICENSE) [readme](../../README.md#your-own-images) ![loss](../../results/loss.svg)\n"
    )
    with (clone / "mkdocs.yml").open("a") as file:
        file.write("  - Links: sub/links.md\n")
    done = build(clone, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    files = f"{project['urls']['Repository']}/blob/main"
    body = (tmp_path / "site/sub/links/index.html").read_text().partition("<article")[2].partition("</p>")[0]
    found = re.findall(r'<(?:a href|img alt="loss" src)="([^"]+)"', body)
    assert found[-6:] == [
        *("../../config_fields/#data", "../../BUILD/#tests", "../../results/"),
        *(f"{files}/LICENSE", f"{files}/README.md#your-own-images", "../../results/loss.svg"),
    ]

    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text()
        assert not re.findall(r'<(?:script|img|link|iframe)[^>]*(?:src|href)="https?:[^"]*"', text), page
        # What GitHub shows as a list or table and Python-Markdown does not, for want of an empty line before it.
        prose = re.sub(r"<(pre|code)\b.*?</\1>", "", text.partition("<article")[2], flags=re.DOTALL)
        assert not re.findall(r"<p>(?:(?!</p>)[\s\S])*\n(?:[-*]|\d+\.) .*|\|---.*|```.*|\]\([^)]*", prose), page

    (clone / "docs/sub/links.md").write_text("[nothing](../../nothing.md) [no section](../config_fields.md#nowhere)\n")
    done = build(clone, tmp_path / "site")
    assert done.returncode != 0
    assert "'../../nothing.md'" in done.stderr
    assert "'#nowhere'" in done.stderr
