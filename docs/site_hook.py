"""A hook of mkdocs: pages outside docs/ become part of the site, and links work as they do on GitHub.

A link is resolved as GitHub resolves it, from the page's place in the repository. If its target is in the site it
becomes a link within the site, and if it is another file of the repository a link to that file on the project's host.
What does not exist is left as it is, and `mkdocs build --strict` fails on it.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
ADDED = ("BUILD.md", "CHANGELOG.md", "results/*.*")
LINK = re.compile(r"(?<=\]\()([^()\s#:]+)(?=[#)\s])")  # the path in [text](path#anchor), unless it is a URL


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files that are outside docs/."""
    for pattern in ADDED:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Resolves the links of a page."""
    in_site = {repository_path(file): file.src_uri for file in files if file.inclusion.is_included()}
    place = posixpath.dirname(repository_path(page.file))

    def resolved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(place, link[1]))
        if target in in_site:
            return posixpath.relpath(in_site[target], posixpath.dirname(page.file.src_uri) or ".")
        if (ROOT / target).exists() and not target.startswith(".."):
            return f"{config.repo_url}/blob/main/{target}"
        return link[1]

    return LINK.sub(resolved, markdown)


def repository_path(file: File) -> str:
    """Returns where a file of the site is in the repository: "docs/measurements.md", "BUILD.md"."""
    assert file.abs_src_path is not None
    path = Path(file.abs_src_path).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else f"docs/{file.src_uri}"
