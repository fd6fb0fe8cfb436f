"""The files that a host of repositories reads: workflows, forms, the citation. Their formats, and what they name."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GITHUB = ROOT / ".github"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted(GITHUB.glob("workflows/*.yml"))


def check(program: str, *arguments: str | Path) -> None:
    """Runs a program of this environment; it must find nothing."""
    command = [Path(sys.executable).with_name(program), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("schema", "pattern"),
    [
        ("vendor.github-workflows", ".github/workflows/*.yml"),
        ("custom.github-workflows-require-timeout", ".github/workflows/*.yml"),
        ("vendor.github-issue-forms", ".github/ISSUE_TEMPLATE/*_*.yml"),
        ("vendor.github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
        ("vendor.citation-file-format", "CITATION.cff"),
    ],
)
def test_formats(schema, pattern):
    """By the schemas that come with check-jsonschema: no network."""
    files = sorted(ROOT.glob(pattern))
    assert files
    check("check-jsonschema", "--builtin-schema", schema, *files)


def test_workflows_are_safe():
    """No injection, no more permissions than needed, no credentials left, actions pinned as .github/zizmor.yml says."""
    check("zizmor", "--offline", "--no-progress", "--quiet", GITHUB)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_what_workflows_name_exists(path):
    """Scripts and extras; and the Pythons tested are those that pyproject.toml promises."""
    text = path.read_text(encoding="utf-8")
    for script in re.findall(r"\bbash ([\w./]+)", text):
        assert (ROOT / script).exists(), script
    extras = {extra for found in re.findall(r"'\.\[([\w,]+)\]'", text) for extra in found.split(",")}
    assert extras <= PROJECT["optional-dependencies"].keys()
    promised = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if ":: 3." in text]
    (tested,) = re.findall(r"^ +python: (\[.*\])$", text, re.MULTILINE)
    tested = re.findall(r"[\d.]+", tested)
    assert tested == promised if path.stem == "ci" else set(tested) <= set(promised)


def test_one_version_and_one_address():
    """Of the project, wherever they are said."""
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {PROJECT['version']}\n" in cited
    host = PROJECT["urls"]["Repository"]
    assert f"\nrepository-code: {host}\n" in cited
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert f"\nrepo_url: {host}\n" in site
    assert f"\nrepo_name: {'/'.join(host.split('/')[-2:])}\n" in site
    texts = [path.read_text(encoding="utf-8") for path in [*GITHUB.rglob("*.yml"), ROOT / "pyproject.toml"]]
    found = {link for text in texts for link in re.findall(r"https://github\.com/[\w.-]+/[\w.-]+", text)}
    assert found == {host}
