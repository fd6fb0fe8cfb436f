"""Every command, flag, field and file that a document, a config's head or a message names, taken from them as printed.

What is a command is found by its form, so that texts written later are held to this as well. A shell splits them into
arguments, with functions in the place of the programs; what is ours is then parsed as the program itself would.
"""

import ast
import contextlib
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml
from etils import epath
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

import configs.default
from configs import recipes, smoke
from mae_dist import config as config_lib
from mae_dist import errors
from mae_dist.data import AUGMENTATIONS, SOURCES
from mae_dist.metrics import results
from mae_dist.model import masking
from mae_dist.model.build import abstract_params
from mae_dist.optim.optimizer import OPTIMIZERS
from mae_dist.parallel import shardings
from mae_dist.parallel.mesh import AXES, mesh_shape
from mae_dist.sweep import points
from mae_dist.task_kinds import TASK_KINDS
from mae_dist.tasks.make import _MAKERS
from mae_dist.trackers.base import TRACKERS
from mae_dist.training import job
from mae_dist.weights import pretrained
from mae_dist.weights.compatible import check_fits
from tests import commands
from tests.commands import ROOT

COMMANDS = (
    *("main", "reconstruct", "report", "convert", "features", "knn", "sweep", "benchmark", "plan", "prepare"),
    *("export", "checkpoint", "predict"),
)
FIELDS = dict(config_lib.flatten(configs.default.get_config()))
SECTIONS = sorted({field.partition(".")[0] for field in FIELDS if "." in field})
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
GUIDES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = ("README.md", "BUILD.md", "CHANGELOG.md", "results/README.md", *GUIDES)
LAUNCHERS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "launch").iterdir())
FLAGS = {name: commands.flag_names(name) for name in COMMANDS if name != "checkpoint"}

PROGRAMS = (  # that a text may tell to run; the rest of a command line is a program's own affair unless it is ours
    *("python", "python3", ".venv/bin/pip", "pip", "bash", "source", "sbatch", "docker", "kubectl"),
    *("gcloud", "sky", "tfds", "tensorboard", "wandb"),
)
OF_OTHERS = {  # options of those programs, and of XLA
    *("file_format", "data_dir", "logdir", "shm-size", "project", "location", "help", "no-standard-images"),
    *("show-deprecated", "xla_force_host_platform_device_count", "signal", "kill-on-bad-exit"),
    *("env", "gpus", "num-nodes", "no-use-spot", "infra"),
}
META = {"N": "1", "C": "3", "i": "1", "B": "64", "H,W": "32,32", "--config.a.b=value": "--config.seed=1"}


# --- texts ------------------------------------------------------------------------------------------------------------


def blocks(text: str) -> Iterator[str]:
    """The code blocks of a Markdown file, fenced or indented."""
    yield from re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for block in re.findall(r"(?<=\n\n)((?: {4}.*\n|\n(?= {4}))+)", text):
        if block.strip().startswith(("python", "common", "for ", "bash")):
            yield block


def spans(text: str) -> Iterator[str]:
    """The code spans of a text, each on one line."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`]+)`", text):
        yield " ".join(span.split())


def written_out(span: str) -> Iterator[str]:
    """The command lines that a usage stands for: optional parts given, each of its alternatives, names filled in."""
    text = re.sub(r"<[^<>]+>", "PLACE", span.replace("\\|", "|").replace("gs://…", "gs://B").replace("=…", "=X"))
    text = re.sub(r"(?<!\S)\[((?:[^\[\]]|\[[^\]]*\])*)\](?!\S)", r"\1", text)  # [--k 20], not train[:10%] or .[tpu]
    text = re.sub(r"(?<= )(--\w+) …", r"\1 X", text).replace("…", "")
    words = [META.get(word, word) for word in text.split()]
    for index, word in enumerate(words[:-1]):
        if word == "--config" and words[index + 1] == "F":
            words[index + 1] = "configs/smoke.py"
    choices = [word.split("|") for word in words]
    for turn in range(max(map(len, choices))):
        line = " ".join(choice[turn % len(choice)] for choice in choices)
        yield re.sub(r"(?<=\w)(\[[^\]]*\])", r"'\1'", line).replace("(", "'('").replace(")", "')'")


def command_of(span: str) -> str | None:
    """A code span as a command line, if it is one, whole or from its second word on."""
    first, *rest = span.split()
    if first in PROGRAMS or first.startswith("python3"):
        return span if rest else None
    if first in COMMANDS and (rest or [""])[0].startswith(("--", "cifar10")):
        return f"python -m mae_dist.{span}"
    if re.fullmatch(r"\w+\.py", first) and rest and rest[0].startswith("--"):
        measures = any(word.startswith(("--secs", "--repeats", "--what")) for word in rest)
        return f"python -m mae_dist.{'benchmark' if measures else 'main'} --config configs/{span}"
    return None


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def scripts_of(name: str) -> Iterator[str]:
    """The command lines that a file offers: of a document, of a config's or command's head, of a script's head."""
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        for block in blocks(text):
            yield re.sub(r"<[^<>]+>", "PLACE", block).replace("<directory>", "D")
    elif path.suffix == ".py":
        text = docstring(path)
        yield from re.findall(r"^(?:python|bash) (?:.*\\\n)*.*$", text, re.MULTILINE)
    else:  # the lines of the head's comment that stand apart from its prose, without what is said of them
        head = re.sub(r"^(?!#).*\Z", "", text.partition("bash\n")[2] or text, flags=re.MULTILINE | re.DOTALL)
        for line in re.findall(r"^# {3}(\S(?:.*\\\n)*.*)$", head, re.MULTILINE):
            line = re.split(r" {2,}(?![-.])", re.sub(r"\\\n#\s*", "", line))[0]
            if line.split()[0] in (*PROGRAMS, "sed", "python3"):
                yield from written_out(re.sub(r"\[options\]|\(or .*", "", line)) if " | " not in line else [line]
        return
    for span in spans(text):
        command = command_of(span)
        if command is not None:
            yield from written_out(command)


def files_in(path: Path) -> list[tuple[str, str]]:
    """The files that a guide shows, which its commands use."""
    text = path.read_text(encoding="utf-8") if path.suffix == ".md" else ""
    return re.findall(r"^<!-- block: file (\S+) -->\n```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def argument_lists(scripts: Sequence[str]) -> list[list[str]]:
    """What programs a shell would start for these scripts, with which arguments; none of them runs."""
    functions = [f'{name}() {{ printf "%s\\037" {name} "$@"; printf "\\036"; }}' for name in PROGRAMS]
    bodies = [f"(\n{re.sub(r' &$', '', script, flags=re.MULTILINE)}\n)" for script in scripts]
    program = "\n".join(["set -u", *functions, *bodies])
    done = subprocess.run(
        ["/bin/bash", "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert not done.stderr, done.stderr
    return [line.split("\037")[:-1] for line in done.stdout.split("\036") if line.strip()]


# --- commands ---------------------------------------------------------------------------------------------------------


def judge(argv: Sequence[str], tmp_path: Path) -> None:
    """Raises whatever is wrong with a command line."""
    program, *rest = argv
    if program.startswith("python") and rest[0] == "-m":
        judge_module(rest[1], rest[2:])
    elif program == "bash" and rest[0].startswith("launch/gcp"):
        judge_launcher(rest[0], rest[1:])
    elif program == "bash" and rest[0] == "launch/local.sh":
        assert not rest[1:] or commands.parse("main", rest[1:])
    elif program == "bash":
        assert (ROOT / rest[0]).exists()
        for word in rest[1:]:
            assert not word.startswith("tests/") or word == "tests/test_x.py" or (ROOT / word).exists(), word
        if "-k" in rest and "tests/test_x.py" not in rest:
            assert re.search(rf"^def test_\w*{rest[rest.index('-k') + 1]}", (ROOT / rest[1]).read_text(), re.MULTILINE)
    elif program == "sbatch":
        script = next(index for index, word in enumerate(rest) if not word.startswith("--"))
        assert (ROOT / rest[script]).exists()
        commands.parse("main", rest[script + 1 :])
    elif program == "sky" and rest[:2] == ["jobs", "launch"]:
        envs = yaml.safe_load((ROOT / rest[2]).read_text())["envs"]
        given = dict(word.split("=", 1) for option, word in itertools.pairwise(rest) if option == "--env")
        assert (given.keys() <= envs.keys(), "WORKDIR" in given) == (True, True), given
        commands.parse("main", ["--config", (envs | given)["CONFIG"], *(envs | given)["FLAGS"].split()])
    elif program == "docker" and rest[0] == "build":
        target = rest[rest.index("--target") + 1]
        assert f" AS {target}" in (ROOT / rest[rest.index("-f") + 1]).read_text(), target
    elif program == "docker" and rest[0] == "run" and any(":" in word and "/" not in word for word in rest):
        image = next(index for index, word in enumerate(rest) if word.startswith("mae_dist:"))
        commands.parse("main", rest[image + 1 :])
    elif program.endswith("pip"):
        assert rest[0] == "install", rest
        if rest[-1].startswith(("git+https://", "skypilot[")):
            return
        extras = re.fullmatch(r"\.\[(.+)\]", rest[-1])
        assert extras is not None, rest
        assert set(extras[1].split(",")) <= EXTRAS.keys(), rest


def judge_module(module: str, arguments: Sequence[str]) -> ConfigDict | None:
    package, _, name = module.partition(".")
    if package != "mae_dist" or name not in COMMANDS:
        assert module == "venv" or (ROOT / f"{module.replace('.', '/')}.py").exists(), f"there is no module {module}"
        return None
    config = commands.parse(name, arguments) if arguments and arguments != ["--help"] else None
    for flag, value in itertools.pairwise(arguments):
        if flag == "--over" and value != "config.a.b=x,y":
            assert config is not None, arguments
            points.parse_over([value], config)
        if flag == "--set":
            recipe, _, field = value.partition("=")[0].partition(".")
            assert (hasattr(recipes, recipe), field in FIELDS) == (True, True), value
    return config


def judge_launcher(script: str, arguments: Sequence[str]) -> None:
    """Runs it with `--dry_run`; a mesh must divide over the slice that is asked for."""
    done = subprocess.run(
        ["bash", script, *arguments[:1], "--dry_run", *arguments[1:]]
        if arguments[:1] in (["status"], ["delete"])
        else ["bash", script, "--dry_run", *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if "--" in arguments:
        config = commands.parse("main", arguments[arguments.index("--") + 1 :])
        assert config is not None
        chips = re.search(r"v5litepod-(\d+)", " ".join(arguments))
        slices = re.search(r"--num_slices (\d+)", " ".join(arguments))
        if chips and "--config configs/smoke.py" not in " ".join(arguments):
            job.check_mesh(config, int(chips[1]) * int(slices[1] if slices else 1))


CONFIG_FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").glob("*.py"))
MODULE_FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "mae_dist").rglob("*.py"))
SCRIPTS = [*LAUNCHERS, "tests/run.sh", "tests/soak.sh"]


@pytest.mark.parametrize("names", [[name] for name in DOCUMENTS] + [CONFIG_FILES, MODULE_FILES, SCRIPTS])
def test_commands_of_documents_and_heads(names, tmp_path, monkeypatch):
    """Each is taken by the program that it names, with every flag, field and value."""
    monkeypatch.syspath_prepend(tmp_path)
    for registry in (masking.STRATEGIES, TRACKERS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setattr("mae_dist.trackers.base._is_installed", lambda package: True)
    for file, text in [found for name in names for found in files_in(ROOT / name)]:
        (tmp_path / file).write_text(text, encoding="utf-8")
    found = [script for name in names for script in scripts_of(name)]
    assert found or names == ["CHANGELOG.md"]
    faults = []
    for argv in argument_lists(found):
        try:
            judge(argv, tmp_path)
        except (Exception, SystemExit) as error:
            faults.append(f"{' '.join(argv)}\n    {type(error).__name__}: {error}")
    assert not faults, "\n".join(faults)


# --- names ------------------------------------------------------------------------------------------------------------


def messages(path: Path) -> Iterator[str]:
    """The texts in a module, not its docstrings, with PLACE where a value is put in."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    passed = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            passed.update(id(part) for part in node.values)
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "PLACE" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in passed:
            yield node.value


def is_said(text: str) -> bool:
    """True if a text is a sentence or a part of one, not a key, a format or a style sheet."""
    return len(text.split()) >= 4 and "{" not in text


def name_faults(text: str, known_flags: set[str], is_message: bool = True) -> Iterator[str]:
    """What a text names and does not exist: flags, fields of the config, configs, extras, commands."""
    for flag in re.findall(r"(?<![\w-])--([a-zA-Z][\w.-]*)", text):
        field = flag.rstrip(".-").removeprefix("config.")
        if flag.startswith("config.") and not (field in KNOWN or "PLACE" in field):
            yield f"--{flag} is no field"
        if not flag.startswith("config.") and flag.rstrip(".") not in known_flags | OF_OTHERS | {"PLACE"}:
            yield f"--{flag} is no flag"
    for section, name in re.findall(rf"(?<![\w./'-])({'|'.join(SECTIONS)})\.([a-z]\w+)", text):
        if f"{section}.{name}" not in FIELDS and "PLACE" not in name and name != "safetensors":
            yield f"{section}.{name} is no field"
    for name in re.findall(r"(?<![\w./-])[a-z]+(?:_[a-z]+)+(?![\w(/])", text if is_message else ""):
        if name in WITHIN_SECTIONS:
            yield f"{name} is said without its section"
    for path in re.findall(r"(?<![\w/])(?:mae_dist|configs|docs|launch|tests|results)/[\w./${}]*\w", text):
        if "$" not in path and not (ROOT / path).exists():
            yield f"there is no {path}"
    for extra in re.findall(r"(?<!\w)\.\[([\w,]+)\]", text):
        if not set(extra.split(",")) <= EXTRAS.keys():
            yield f"there is no extra {extra}"
    for module, rest in re.findall(
        r"python -m mae_dist\.(\w+)((?: (?:--[\w.]+=?\S*|verify|list|rm-\w+|[A-Z0-9]\w*))*)", text
    ):
        if module not in COMMANDS:
            yield f"mae_dist.{module} is no command"
        elif rest and is_message:
            commands.parse(module, rest.split())


ALL_FLAGS = set().union(*FLAGS.values())
KNOWN = {*FIELDS, *SECTIONS, "a.b", "field"}
WITHIN_SECTIONS = {field.rpartition(".")[2] for field in FIELDS if "." in field} - FIELDS.keys() - ALL_FLAGS


IN_PYTHON = {  # names of arguments of functions that users call
    "batches": {"num_workers"},
    "encoder": {"batch_size"},
    "transforms": {"crop_scale"},
    "foreign": {"pos_embed"},  # of timm
    "pretrained": {"pos_embed"},
}


@pytest.mark.parametrize("name", MODULE_FILES)
def test_what_messages_name_exists(name):
    """Flags are those of the command that says it, or of any where all do."""
    module = Path(name).stem
    known = FLAGS[module] if module in FLAGS and module != "main" else ALL_FLAGS
    texts = filter(is_said, messages(ROOT / name))
    found = [(fault, text) for text in texts for fault in name_faults(text, known)]
    faults = [f"{fault}: {text}" for fault, text in found if fault.split()[0] not in IN_PYTHON.get(module, ())]
    assert not faults, "\n".join(faults)


def test_what_documents_name_exists():
    """In code spans and blocks: flags, fields, files, configs, tests."""
    tests = {*re.findall(r"^def (test_\w+)", "\n".join(p.read_text() for p in ROOT.glob("tests/*.py")), re.MULTILINE)}
    tests |= {path.stem for path in ROOT.glob("tests/*.py")}
    options = {name for script in SCRIPTS for name in re.findall(r"--([\w-]+)", (ROOT / script).read_text())}
    files = {
        path.name for folder in ("configs", "mae_dist", "tests", "launch") for path in (ROOT / folder).rglob("*.*")
    }
    faults = []
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        for code in [*spans(text), *blocks(text)]:
            found = [fault for fault in name_faults(code, ALL_FLAGS | options, False) if not is_of_a_module(fault)]
            if re.fullmatch(r"test_\w+(\[.*\])?", code) and code.partition("[")[0] not in tests:
                found.append(f"there is no {code}")
            if re.fullmatch(r"\w+\.(py|sh)", code) and code not in files | {"utils.py", "mine.py"}:
                found.append(f"there is no {code}")
            faults += [f"{document}: {fault}: {code}" for fault in found]
    assert not faults, "\n".join(faults)


def is_of_a_module(fault: str) -> bool:
    """True for `cpu.cache_bytes`, a function of mae_dist.cpu."""
    module, _, name = fault.removesuffix(" is no field").partition(".")
    return (ROOT / f"mae_dist/{module}.py").exists() and hasattr(importlib.import_module(f"mae_dist.{module}"), name)


def test_samples_of_the_contributor_guide(tmp_path, monkeypatch):
    """Checks that the module in BUILD.md registers its parts, and that the lines to change are in the package."""
    text = (ROOT / "BUILD.md").read_text(encoding="utf-8")
    (module,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "parts_of_the_guide.py").write_text(module, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for registry in (masking.STRATEGIES, TASK_KINDS, _MAKERS, SOURCES, OPTIMIZERS, AUGMENTATIONS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    config = smoke.get_config()
    config.imports, config.task, config.model.masking = ("parts_of_the_guide",), "weighted_pretrain", "stripes"
    config.data.source, config.optim.name, config.data.augment = "npy", "nadamw", "darken"
    config_lib.validate(config)
    for diff in re.findall(r"^```diff\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for part in re.split(r"^ # ", diff, flags=re.MULTILINE)[1:]:
            place, *lines = part.splitlines()
            code = (ROOT / "mae_dist" / place.partition(",")[0]).read_text(encoding="utf-8").splitlines()
            assert {line[1:] for line in lines if not line.startswith("+")} <= set(code), place


# --- heads of configs -------------------------------------------------------------------------------------------------

MESH_LINE = re.compile(r"^ {2}(v5e-(\d+)|(\d+) x H100) {2,}((?:.*\n)(?: {14}.*\n)*)", re.MULTILINE)
MESHES = [
    pytest.param(name, int(line[2] or line[3]), " ".join(line[4].split()), id=f"{Path(name).stem}-{line[1]}")
    for name in CONFIG_FILES
    for line in MESH_LINE.finditer(docstring(ROOT / name) + "\n")
]


@pytest.mark.parametrize(("name", "devices", "said"), MESHES)
def test_meshes_of_heads(name, devices, said):
    """Batch, heads and every parameter divide over it; what the line says of its size and of images is so."""
    overrides = re.findall(r"--config\.\S+?(?=[,;)]?(?:\s|$))", said)
    config = commands.parse("main", ["--config", name, *overrides])
    assert config is not None
    job.check_mesh(config, devices)
    data, fsdp, tensor = mesh_shape(config.mesh.to_dict(), devices)
    mesh = AbstractMesh((data, fsdp, tensor), AXES)
    shardings.param_shardings(mesh, abstract_params(config, 1000))  # pyright: ignore[reportArgumentType]
    for size in re.findall(r"mesh\.data=(\d+)", said):
        assert data == int(size)
    for images in re.findall(r"(\d+) images (?:a chip|a device|at a time)", said):
        assert config.global_batch_size == int(images) * data * fsdp * config.accum_steps


# --- cures ------------------------------------------------------------------------------------------------------------


def follow(config: ConfigDict, faults: str) -> None:
    """Does what the message says: sets a field that it begins with to the nearest value or the end of a range."""
    for line in faults.splitlines()[1:]:
        field = re.match(r"\W*([\w.]+)", line)
        value = re.search(
            r"(?:that does|divide too): ([\d.]+)\b|choose (?:at least )?([\d.e-]+)(?: to ([\d.e-]+))?$", line
        )
        assert field is not None
        assert value is not None, line
        text = value[3] or value[2] or value[1]
        old = config_lib.get(config, field[1])
        if isinstance(old, tuple):
            old, text = None, (int(text), int(text))
        config.update_from_flattened_dict({field[1]: text if old is None else type(old)(text)})


@pytest.mark.parametrize(
    "fields",
    [
        {"embed_dim": [3, 8, 30, 66, 96, 130], "num_heads": [1, 3, 4, 5, 7], "pos_embed": ["sincos1d", "sincos2d"]},
        {"decoder_embed_dim": [10, 32, 66], "decoder_num_heads": [2, 3, 5], "pos_embed": ["learned", "sincos2d"]},
        {"embed_dim": [4, 64, 72, 128, 768], "mlp_ratio": [1e-4]},
        {"image_size": [(16, 16), (12, 12)], "patch_size": [(2, 2), (5, 5), (7, 4)], "mask_ratio": [0.01, 0.75, 0.999]},
    ],
)
def test_cures_of_models_work(fields):
    """What a message advises is done, and the config works; a ratio of patches is judged once there are patches."""
    followed = 0
    for values in itertools.product(*fields.values()):
        config = smoke.get_config()
        config.model.update({"num_heads": 1, **dict(zip(fields, values, strict=True))})
        for _ in range(2 if "patch_size" in fields else 1):
            with contextlib.suppress(errors.ConfigError):
                config_lib.validate(config)
                break
            with pytest.raises(errors.ConfigError) as refused:
                config_lib.validate(config)
            follow(config, str(refused.value))
            followed += 1
        config_lib.validate(config)
    assert followed


@pytest.mark.parametrize("batch", [1, 6, 96, 100, 128, 255])
@pytest.mark.parametrize("field", ["accum_steps", "data.repeats"])
def test_cures_of_batches_work(batch, field):
    """Of all numbers that do not divide a batch."""
    for number in range(1, 40):
        config = smoke.get_config()
        config.global_batch_size = batch
        config.update_from_flattened_dict({field: number})
        if batch % number:
            with pytest.raises(errors.ConfigError) as refused:
                config_lib.validate(config)
            follow(config, str(refused.value))
        config_lib.validate(config)
        with contextlib.suppress(errors.ConfigError):
            job.check_mesh(config, 8)
            continue
        with pytest.raises(errors.ConfigError) as refused:
            job.check_mesh(config, 8)
        follow(config, f"\n{refused.value}")
        job.check_mesh(config, 8)


@pytest.mark.parametrize("grid", [(4, 4), (2, 8), (3, 6), (7, 7)])
def test_ratios_of_grids_work(grid):
    """Each that the message lists."""
    with pytest.raises(errors.ConfigError) as refused:
        masking.grid_mask(grid, 0.123)
    ratios = str(refused.value).rpartition(": ")[2].split(", ")
    assert len(ratios) > 1
    for ratio in ratios:
        masking.grid_mask(grid, float(ratio))


# --- lines that commands print ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A directory with `configs` in it, as a clone is."""
    clone = tmp_path_factory.mktemp("clone")
    (clone / "configs").symlink_to(ROOT / "configs")
    return clone


@pytest.fixture(scope="module")
def place(clone, child_env):
    """The same, where the command of configs/smoke.py has run as printed."""
    (line,) = scripts_of("configs/smoke.py")
    run_line(line, clone, child_env())
    assert (clone / "runs/smoke/summary.json").exists()
    return clone


def run_line(line: str, place: Path, env: dict[str, str], expected: int = 0) -> str:
    """Runs a printed `python -m …` in a directory. Returns what it printed."""
    program, *arguments = shlex.split(line)
    assert program in ("python", sys.executable), line
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=place,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == expected, done.stdout
    return done.stdout


def line_in(text: str) -> str:
    """The command in a message, with its arguments."""
    (line,) = re.findall(r"python -m mae_dist\.\w+(?: (?:--\S+|rm-quarantine|'[^']*'|/\S+))+", text)
    return line


@pytest.mark.long
def test_corruptiond_config_and_summary_are_written_again(place, child_env):
    """By the cure that the message gives: the run's own command, after the summary was deleted."""
    (line,) = scripts_of("configs/smoke.py")
    workdir = epath.Path(place / "runs/smoke")
    before = [(workdir / name).read_text() for name in ("config.json", "summary.json")]
    (workdir / "config.json").write_text(before[0][:50])
    with pytest.raises(errors.StorageFault, match=r"delete summary\.json, and the run's own command writes both"):
        results.read_result(workdir)
    (workdir / "summary.json").unlink()
    run_line(line, place, child_env())
    assert (workdir / "config.json").read_text() == before[0]
    assert json.loads((workdir / "summary.json").read_text()).keys() == json.loads(before[1]).keys()
    assert results.read_result(workdir) is not None


@pytest.mark.long
def test_weights_of_another_size_are_converted_as_said(place, child_env):
    """The line that the message prints runs, and what it says to train with then fits."""
    config = smoke.get_config()
    source, config.init_from = config.copy_and_resolve_references(), str(place / "runs/smoke")
    config.model.update(image_size=(24, 16), channels=1)
    with pytest.raises(errors.StorageFault, match="or convert the weights first") as refused:
        check_fits(source, config, ("encoder", "decoder"))
    line, _, then = str(refused.value).rpartition(" and train with ")
    run_line(line_in(line), place, child_env())
    given = ["--config", "configs/smoke.py", *shlex.split(then.rstrip("."))]
    config = commands.parse("main", [*given, "--config.model.image_size=(24, 16)", "--config.model.channels=1"])
    assert config is not None
    converted = pretrained.open_pretrained(epath.Path(config.init_from))
    check_fits(converted.config, config, ("encoder", "decoder"))
    config.model.embed_dim = 64
    with pytest.raises(errors.StorageFault) as refused:
        check_fits(converted.config, config, ("encoder",))
    assert "convert" not in str(refused.value).splitlines()[-1]  # which changes no widths


@pytest.mark.long
def test_quarantine_is_emptied_by_the_line_that_is_printed(place, child_env):
    """In a directory whose name a shell would take apart."""
    workdir = place / "runs" / "it's a run"
    shutil.copytree(place / "runs/smoke", workdir)
    for path in workdir.glob("checkpoints/*/state/**/*"):
        if path.is_file():
            path.write_bytes(b"")
    printed = run_line(
        f"python -m mae_dist.main --config configs/smoke.py --workdir {shlex.quote(str(workdir))}",
        place,
        child_env(),
        errors.EXIT_STORAGE,
    )
    line = printed.rpartition("to begin anew; ")[2].partition(" gives these up")[0]
    assert [path for path in (workdir / "quarantine").iterdir() if path.is_dir()]
    run_line(line, place, child_env())
    assert not [path for path in (workdir / "quarantine").glob("*") if path.is_dir()]


def test_lines_of_a_dry_run_are_the_trainings(clone, child_env):
    """A sweep's, whose values a shell would take apart: each is a config that works, in a workdir of its own."""
    line = (
        "python -m mae_dist.sweep --config configs/smoke.py --over 'config.data.train_split=train[:50%],train' "
        "--seeds 2 --then probe --set probe.total_epochs=6 --out 'runs/a sweep' --dry_run"
    )
    lines = [line for line in run_line(line, clone, child_env()).splitlines() if " -m mae_dist.main " in line]
    assert len(lines) == 8
    found = [shlex.split(line) for line in lines]
    assert {tuple(words[:3]) for words in found} == {(sys.executable, "-m", "mae_dist.main")}
    parsed = [commands.parse("main", words[3:]) for words in found]
    names = [(config.task, config.data.train_split, config.seed) for config in parsed if config is not None]
    assert sorted(names) == sorted(itertools.product(["pretrain", "probe"], ["train[:50%]", "train"], [0, 1]))
    assert len({words[-1] for words in found}) == 8
