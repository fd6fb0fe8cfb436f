"""Blocks and links of README and the guides: blocks run in the order of their page, and links lead somewhere.

A page's blocks share a directory with `photos`, `bands`, `labels.csv` and the trained runs that it begins with.
Trainings are shrunk to two steps of a model with one block. A comment before a block says how else it is treated:
`<!-- block: KIND -->` with one of `KINDS`.
"""

import csv
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests import test_advice
from tests.commands import ROOT
from tests.runs import free_port

GUIDES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
LINKED = ["README.md", "BUILD.md", "CHANGELOG.md", "CONTRIBUTING.md", "results/README.md", *GUIDES]
WITH_BLOCKS = [name for name in ["README.md", *GUIDES] if name not in ("docs/measurements.md", "docs/config_fields.md")]
KINDS = {
    "help": "runs elsewhere or for hours: the commands are parsed with their flags and answer --help",
    "dry": "a launcher: runs with --dry_run",
    "codes": "each command ends with the code that is given for it",
    "file": "becomes the file of this name, which the next blocks use",
    "processes": "starts several processes on a port, which is replaced by a free one",
    "text": "is no program: output, or a part of a file",
}
BEGINS_WITH = {  # runs that a page takes for granted
    "docs/evaluation.md": ("cifar_small",),
    "docs/weights_and_features.md": ("folder",),
}
TRAIN = {
    "cifar_small": "python -m mae_dist.main --config configs/cifar_small.py",
    "folder": "python -m mae_dist.main --config configs/folder.py:mini,64,8 --config.data.data_dir=photos",
}
# Stands for `python` in the blocks: the same command, made small.
SHIM = """#!/bin/bash
small=()
case "$*" in
    *simulate_preemption*|*configs/smoke.py*|*mae_dist.plan*|*--dry_run*) ;;
    *mae_dist.main*|*mae_dist.benchmark*|*mae_dist.prepare*--stats*)
        small=(--config.total_steps=2 --config.model.depth=1 --config.model.decoder_depth=1 --config.log_every_steps=1
            --config.global_batch_size=8 --config.eval.batch_size=8 --config.online.num_train=16 --config.ema_decay=0
            --config.pictures.num_images=2) ;;
esac
case "$*" in
    *configs/cifar_*) small+=(--config.data.source=synthetic --config.data.num_examples=64) ;;
esac
[[ "$*" == *mae_dist.plan* || "$*" == *--dry_run* ]] && small=()
[[ "$*" == *mae_dist.plan* ]] && unset XLA_FLAGS  # which says how many devices there are
exec REAL "$@" "${small[@]}"
"""


class Block(NamedTuple):
    """A fenced block: its language, text, and the words of the comment before it."""

    language: str
    text: str
    kind: list[str]


def blocks_of(name: str) -> Iterator[Block]:
    text = (ROOT / name).read_text(encoding="utf-8")
    for mark, language, block in re.findall(
        r"(?:^<!-- block: (.+?) -->\n)?^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL
    ):
        yield Block(language, block, mark.split())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, child_env: Callable[..., dict[str, str]]) -> Callable[[str], Path]:
    """`site(page)`: a directory for a page's blocks, with images and the runs that the page begins with."""
    base = tmp_path_factory.mktemp("site")
    draw = np.random.default_rng(0)
    names = [f"{place}/{i}.png" for place in ("holiday/2024", "home", "new") for i in range(12)]
    for i, name in enumerate(names):
        file = base / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        low = draw.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(low).resize((80 + i, 60), Image.Resampling.BICUBIC).save(file)
    with open(base / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path", "label"], *([name, name.partition("/")[0]] for name in names)])
    (base / "bands").mkdir()
    for i in range(12):
        np.save(base / "bands" / f"{i}.npy", draw.integers(0, 10_000, (96, 96, 13), dtype=np.uint16))
    for name in ("configs", "launch", "results", "docs"):
        (base / name).symlink_to(ROOT / name)
    (base / "bin").mkdir()
    for name, line in (("python", SHIM.replace("REAL", sys.executable)), ("mae-dist", "exec python -m mae_dist $@")):
        program = base / "bin" / name
        program.write_text(line if line.startswith("#!") else f"#!/bin/bash\n{line}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    def make(page: str) -> Path:
        place = base / "pages" / page.replace("/", "_")
        shutil.copytree(base, place, symlinks=True, ignore=shutil.ignore_patterns("pages", "trained"))
        for run in BEGINS_WITH.get(page, ()):
            if not (base / "trained" / run).exists():
                shell(base, child_env(2), f"{TRAIN[run]} --workdir trained/{run}")
            shutil.copytree(base / "trained" / run, place / "runs" / run)
        return place

    return make


def shell(place: Path, env: dict[str, str], script: str, code: int = 0) -> None:
    """Runs lines of a shell; they must end with this exit code."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=place,
        env={**env, "PATH": f"{place / 'bin'}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == code, f"{script}\n{done.stdout}"


def parse_and_ask(block: str, tmp_path: Path, env: dict[str, str]) -> None:
    """Parses the commands of a block as their programs would; those of ours answer --help."""
    found = test_advice.argument_lists([re.sub(r"<[^<>]+>", "PLACE", block)])
    assert found, block
    for argv in found:
        test_advice.judge(argv, tmp_path)
    for module in {argv[2] for argv in found if argv[0] == "python"}:
        shell(ROOT, env, f"{sys.executable} -m {module} --help")


@pytest.mark.long
@pytest.mark.parametrize("page", WITH_BLOCKS)
def test_blocks_run(page, site, child_env, tmp_path, monkeypatch):
    monkeypatch.setattr("mae_dist.trackers.base._is_installed", lambda package: True)  # for commands that only parse
    place, env = site(page), child_env(2)
    for block in blocks_of(page):
        kind, *words = block.kind or [""]
        if kind in ("help", "dry"):
            parse_and_ask(block.text, tmp_path, env)
        elif kind == "file":
            (place / words[0]).write_text(block.text)
        elif kind == "codes":
            lines = re.sub(r"\\\n", "", block.text).splitlines()
            for line, code in zip(lines, words, strict=True):
                shell(place, env, line, int(code))
        elif kind == "processes":
            lines, port = re.sub(r"localhost:\d+", "localhost:{}", block.text), free_port()
            shell(place, child_env(1), f"{lines.format(*[port] * lines.count('{}'))}\nwait $!")
        elif kind != "text" and block.language == "sh":
            shell(place, env, block.text)
        elif kind != "text":
            (place / "block.py").write_text(block.text)
            shell(place, env, "python block.py")


@pytest.mark.parametrize("page", WITH_BLOCKS)
def test_blocks_are_programs(page):
    """A page begins with a block, and each has a language and a kind that there is."""
    found = list(blocks_of(page))
    assert found, "a guide begins with a block that works"
    for block in found:
        assert block.language in ("sh", "python") or block.kind[:1] == ["text"], block
        assert not block.kind or block.kind[0] in KINDS, block
        if block.language == "python":
            compile(block.text, page, "exec")
    assert len(re.findall(r"^```\w+$", (ROOT / page).read_text(), re.MULTILINE)) == len(found)


# --- links ------------------------------------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKED)
def test_links(page):
    """Those within the repository lead to a file, and to a heading that it has; names of pictures to pictures."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^()\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    faults = []
    for link in links:
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        if not path.exists():
            faults.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(path):
            faults.append(f"{link}: no such heading")
    assert not faults, "\n".join(faults)


def test_readme_is_short_and_has_pictures():
    """What a reader's first minute depends on."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    cells = [cell.strip() for line in text.splitlines() if line.startswith("|") for cell in line.split("|")]
    links = set(re.findall(r"\]\(([^()\s]+)\)", text))
    assert len(text.splitlines()) <= 200
    assert len(re.findall(r"^#+ ", text, re.MULTILINE)) >= 12
    assert max(map(len, cells)) <= 110, max(cells, key=len)
    assert len(links) >= 10
    assert len(re.findall(r"<img |!\[", text)) >= 2
