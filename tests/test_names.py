"""Names of files with every character that a user may type: they work to the last bit, or are refused with the cure."""

import functools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

from configs import smoke
from mae_dist import os_errors, storage
from mae_dist.checkpoint import reader
from mae_dist.checkpoint.__main__ import command
from mae_dist.checkpoint.manifests import Manifests
from mae_dist.data import open_split
from mae_dist.errors import EXIT_CONFIG, EXIT_DONE, EXIT_PREEMPTED, EXIT_STORAGE, ConfigError, DataFault, StorageFault
from mae_dist.metrics.summary import write_summary
from mae_dist.prepare import examine, folders
from mae_dist.report import pictures
from mae_dist.report.runs import collect, find_workdirs
from tests.runs import ONLY_UPDATES, ROOT, run, smoke_config, start, wait_for_step

ALLOWED = " '\"`$%#&!;|<>(){}],:=+@^~é猫\u0301"
GOOD = (ALLOWED, "-dash", " lead", "trail ", "~", "~root", "a~", ".hidden", "%2F", "$HOME", "x@4", "n" * 255)
PATTERNS = ("kill[lr=1e-3]", "a*b", "what?", "[0-9]")
BAD = {"a\nb": r"'\\n'", "tab\t": r"'\\t'", "bytes\udcff": "0xff"}


@functools.cache
def params():
    """A tree of small arrays, and how they lie."""
    tree = {"encoder": {"a": jnp.arange(6, dtype=jnp.float32).reshape(2, 3)}, "decoder": {"b": jnp.ones(4)}}
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return (
        tree,
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree),
        jax.tree.map(lambda _: sharding, tree),
    )


def save(workdir):
    reader.save_params(workdir, smoke.get_config(), params()[0], "a test")


def check(workdir):
    """The checkpoint in `workdir` is good, and what was saved."""
    tree, abstract, shardings = params()
    _, restored = reader.load_params(workdir, abstract, shardings)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert reader.condition(workdir, 0) == []
    assert reader.steps(workdir) == [0]


@pytest.mark.parametrize(
    "kind", ["name", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("parent", "relative", "link"))]
)
@pytest.mark.parametrize("name", GOOD)
def test_good_names(tmp_path, monkeypatch, name, kind):
    """What is saved there is read back, below such a directory and through a link to it, too."""
    given = {"parent": tmp_path / name / "run", "link": tmp_path / "link"}.get(kind, tmp_path / name)
    if kind == "link":
        (tmp_path / name).mkdir()
        given.symlink_to(tmp_path / name, target_is_directory=True)
    if kind == "relative":
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        given = "run"
    workdir = storage.absolute(f"{given}/")
    storage.check_checkpoints(workdir, saving=True)
    save(workdir)
    check(workdir)


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(tmp_path, name, monkeypatch):
    """Orbax would save in vain there; what was moved there can be read, and saved through a link."""
    for path in (tmp_path / name, tmp_path / name / "run"):
        with pytest.raises(ConfigError, match=r"has the character '[\[*?]'.*symbolic link"):
            storage.check_checkpoints(storage.absolute(path), saving=True)
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(ConfigError, match=r"has the character '[\[*?]'"):
        storage.check_checkpoints(storage.absolute("run"), saving=True)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / name, target_is_directory=True)
    through = storage.absolute(link / "run")
    storage.check_checkpoints(through, saving=True)
    save(through)
    check(through)
    write_summary(through, {"step": 1})
    moved = storage.absolute(tmp_path / name / "run")
    check(moved)
    (moved / "pictures").mkdir()
    (moved / "pictures" / "step_00000001.png").write_bytes(b"")
    assert [path.name for path in pictures.some_pictures(moved)] == ["step_00000001.png"]
    assert Manifests(moved).quarantined() == {}
    Manifests(moved).quarantine(0, "a test")
    assert list(Manifests(moved).quarantined().values()) == ["a test"]


def test_orbax_reads_patterns(tmp_path):
    """Or there would be nothing to refuse: to be seen whenever Orbax or tensorstore mends it."""
    for name in ("a[b]", "a\\b"):
        with pytest.raises(StorageFault, match="written but cannot be read back"):
            save(epath.Path(tmp_path / name))


def test_backslash(tmp_path):
    """tensorstore finds nothing there, whoever wrote it: readers are told as well."""
    save(epath.Path(tmp_path / "run"))
    shutil.copytree(tmp_path / "run", tmp_path / "a\\b")
    for given in (str(tmp_path / "a\\b"), f"{tmp_path}/a\\b/"):
        with pytest.raises(ConfigError, match=r"has the character '\\\\'"):
            reader.read_config(storage.absolute(given))


@pytest.mark.parametrize(("name", "shown"), BAD.items())
@pytest.mark.parametrize(
    "give",
    [
        storage.absolute,
        lambda path: storage.local(path, "--out", ""),
        lambda path: smoke_config(data__data_dir=path),
        lambda path: smoke_config(data__cache_dir=path),
        lambda path: smoke_config(model__mask_file=path),
        lambda path: smoke_config(init_from=path),
        lambda path: command(["list", path]),
        lambda path: find_workdirs([path]),
    ],
)
def test_refused_for_everything(tmp_path, name, shown, give):
    """As the last part of a path or another one."""
    for path in (tmp_path / name, tmp_path / name / "more"):
        with pytest.raises(ConfigError, match=f"(?s){shown}"):
            give(str(path))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("s3://bucket/run", "gs://BUCKET"),
        ("gs:/bucket/run", "gs://BUCKET"),
        ("file:///tmp/run", "gs://BUCKET"),
        ("/gs/run", "takes for a bucket"),
        ("/hf", "takes for a bucket"),
        ("gs://bucket/a#b", "has the character '#'"),
        ("gs://bucket/a?b", r"has the character '\?'"),
        ("gs://bucket/a\nb", r"has the character '\\n'"),
    ],
)
def test_neither_here_nor_in_a_bucket(path, said):
    with pytest.raises(ConfigError, match=said):
        storage.absolute_name(path)


def test_absolute(tmp_path, monkeypatch):
    """From where we are, or home; a directory that is gone is told."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.absolute_name("~/run/") == f"{tmp_path}/run"
    assert storage.absolute_name("gs://bucket//a/./b/") == "gs://bucket/a/b"
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    assert storage.absolute_name("x") == f"{gone}/x"
    gone.rmdir()
    with pytest.raises(ConfigError, match="was deleted"):
        storage.absolute_name("x")


def make_tree(root, name="a", image="0.png"):
    for split in ("train", "test"):
        (root / split / name).mkdir(parents=True)
        Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)).save(root / split / name / "0.png")
        os.rename(root / split / name / "0.png", root / split / name / image)
    return root


def read(data_dir, **changes):
    options: dict[str, Any] = {"source": "tfds", "name": "mine", "image_size": (16, 16), "channels": 3, "stage": False}
    options |= {"cache": "memory", "max_bad_share": 0.0, "num_examples": 0, "num_classes": 0}
    options |= {"data_dir": str(data_dir), **changes}
    return open_split("train", **options)


@pytest.mark.parametrize("name", [*GOOD[:2], "~", "x@4", "a[0:5]", "*?\\"])
def test_data_lie_anywhere(tmp_path, name):
    """Images, what is prepared of them, the cache and the staged copy, where Orbax has no say."""
    from mae_dist.prepare import __main__

    __main__.flags.FLAGS(["test"])
    place = tmp_path / name
    __main__._prepare_folder(str(make_tree(place / "tree", name.strip())), "mine", str(place / "data"))
    for changes in ({"cache": "memory"}, {"cache": "stream"}, {"cache": "stream", "stage": True}):
        dataset = read(place / "data", cache_dir=str(place / "cache"), **changes)
        assert dataset.class_names == (name.strip(),)
        image = dataset.examples(np.arange(1))["image"]
        np.testing.assert_array_equal(image.reshape(-1), np.arange(16 * 16 * 3, dtype=np.uint8))
    np.save(place / "mask.npy", np.array([1, 0, 0, 0]).repeat(4))
    smoke_config(model__masking="user", model__mask_file=str(place / "mask.npy"))


@pytest.mark.parametrize(
    ("name", "image", "said"),
    [
        ("a\udcff", "0.png", "0xff"),
        ("a", "0\udcff.png", "0xff"),
        ("a\nb", "0.png", "a control character"),
        (" a", "0.png", "a space"),
    ],
)
def test_names_in_a_folder(tmp_path, name, image, said):
    """A class or a file that TFDS could not name."""
    root = str(make_tree(tmp_path / "tree", name, image))
    with pytest.raises(DataFault, match=said):
        examine.examine(folders.find_folder(root, None, 0.0), skip_undecodable=False, short_side=0, quality=90)


def test_report_of_a_folder(tmp_path):
    """A run whose name ends in ~ counts; one whose name is no text is left out, in words."""
    for name in ("run~", "run\udcff"):
        save(epath.Path(tmp_path / "clean"))
        os.rename(tmp_path / "clean", tmp_path / name)
    runs, unreadable = collect(find_workdirs([str(tmp_path)]))
    assert [run.workdir.name for run in runs] == ["run~"]
    (line,) = unreadable
    assert "has the byte 0xff, which is not UTF-8" in line
    storage.write_text_atomically(epath.Path(tmp_path / "page.html"), line)
    assert "run\\udcff" in (tmp_path / "page.html").read_text()


@pytest.mark.long
def test_a_run_in_a_nasty_place(child_env, tmp_path):
    """Preempted and continued, by the same line, with the name of a class of characters that do no harm."""
    workdir = tmp_path / ALLOWED / "-run ~"
    line = ("--config=configs/smoke.py", *ONLY_UPDATES, "--config.total_steps=100000", f"--workdir={workdir}")
    process = start(child_env(), *line)
    wait_for_step([process], workdir, 5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_PREEMPTED, output
    assert (workdir.parent / ".compiled").exists() or "JAX_COMPILATION_CACHE_DIR" in child_env()
    process = start(child_env(), *line)
    output = ""
    for text in process.stdout or ():
        output += text
        if "Continuing from step" in text:
            break
    process.kill()
    process.communicate()
    assert "Continuing from step" in output, output
    code, output = run(child_env(), "verify", str(workdir), module="checkpoint")
    assert (code, "good" in output) == (EXIT_DONE, True), output


@pytest.mark.parametrize("module", ["main", "checkpoint"])
@pytest.mark.parametrize("env", [{}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_arguments_that_are_no_text(child_env, module, env):
    """One line, whatever the locale can print."""
    argument = b"list" if module == "checkpoint" else b"--config=configs/smoke.py"
    command = [sys.executable, "-m", f"mae_dist.{module}", argument, b"--config.name=\xc3\xa9\xff"]
    done = subprocess.run(command, cwd=ROOT, env=child_env() | env, capture_output=True, timeout=60, check=False)
    assert done.returncode == EXIT_CONFIG, done.stderr
    (line,) = done.stderr.splitlines()
    assert b"which is not UTF-8" in line or b"LC_ALL=C.UTF-8" in line


def test_refused_run(child_env, tmp_path):
    """At once, before anything is written."""
    code, output = run(child_env(), "--config=configs/smoke.py", f"--workdir={tmp_path / 'kill[lr=1e-3]'}")
    assert code == EXIT_CONFIG, output
    assert "has the character '['" in output
    assert list(tmp_path.iterdir()) == []


FAULTS = {
    "a file": (lambda tmp: tmp / "file", "A file has the name of a directory"),
    "below a file": (lambda tmp: tmp / "file" / "run", "A file has the name of a directory"),
    "proc": (lambda tmp: Path("/proc/nothing/run"), "correct the path"),
    "too long": (lambda tmp: tmp / ("n" * 300), "shorter name"),
}


@pytest.mark.parametrize(("place", "said"), FAULTS.values(), ids=FAULTS)
def test_the_cure_is_for_the_fault(tmp_path, place, said):
    """What fails for want of space and what for another reason are told apart."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFault, match=said), storage.appearing(epath.Path(place(tmp_path) / "run")):
        pass


@pytest.mark.parametrize("number", sorted(os_errors._CURES))
def test_cures(number, tmp_path):
    """By number, or by the text that a library in C++ makes of it; not told: what has none."""
    place = epath.Path(tmp_path)
    cure = os_errors._CURES[number]
    text = f"FAILED_PRECONDITION: {os.strerror(number)} [os_error_code='{number}']"
    for error in (OSError(number, os.strerror(number)), ValueError(text)):
        with pytest.raises(StorageFault) as fault, reader.checkpoint_errors(place):
            raise error
        assert cure in str(fault.value)
    assert os_errors.cure(ValueError("something else")) == ""


def test_broken_config(tmp_path):
    """No disk is full."""
    (tmp_path / "config.json").write_text('{"name": ')
    with pytest.raises(StorageFault, match=r"config\.json is corrupted: .* continue the run"):
        reader.read_config(epath.Path(tmp_path))


@pytest.mark.parametrize("what", ["list", "verify", "rm-quarantine"])
def test_checkpoints_of_nowhere(tmp_path, what):
    """A path mistyped is told, not taken for a run without checkpoints."""
    with pytest.raises(StorageFault, match="is not the workdir of a run"):
        command([what, str(tmp_path / "mistyped")])


@pytest.mark.long
def test_full_disk_is_one_message(child_env, tmp_path):
    """Orbax logs what it raises, and its tasks and tensorstore complain hundreds of times."""
    args = ("--config=configs/smoke.py", *ONLY_UPDATES, "--config.total_steps=40", "--config.checkpoint.every_steps=20")
    process = start(
        child_env(), *args, "--config.checkpoint.retries=0", f"--workdir={tmp_path / 'run'}", file_limit_kib=40
    )
    output, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_STORAGE, output
    assert "Traceback" not in output
    assert output.count("error: ") == 1
    assert os_errors._CURES[27] in output
