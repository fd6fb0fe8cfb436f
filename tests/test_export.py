"""The exported program: in a process without this package, for any number of images, it computes what we do."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from mae_dist import cli, export
from mae_dist.errors import ConfigError
from mae_dist.evaluation import encoder
from mae_dist.evaluation.encode import KINDS
from mae_dist.model import masking, patches
from mae_dist.model.hooks import PLAIN
from mae_dist.parallel import processes
from mae_dist.tasks.make import make_task
from tests import QUICK
from tests.trained import in_memory, save

SCALING = {"model__depth": 1, "data__mean": (0.4, 0.5, 0.6), "data__std": (0.2, 0.3, 0.25)}
# Numbers of images that the other process computes.
BATCHES = {"bytes": (1, 2, 5), "floats": (5,)}
# Name of the file -> fields of the model, and flags.
CASES = {
    "encoder of bytes": (SCALING, {}),
    "encoder of floats": ({**SCALING, "model__cls_token": "none"}, {"input": "float32"}),
    "reconstruction of bytes": ({**SCALING, "pretrain__norm_pix_loss": True}, {"what": "reconstruction"}),
    "reconstruction of floats": (
        {**SCALING, "model__mask_ratio": 0.6},
        {"what": "reconstruction", "input": "float32"},
    ),
}
# Runs files without this package, even where it is installed, on the arguments in `<file>.in.npz`: file, numbers, …
PROGRAM = """
import importlib.util
import sys

sys.modules["mae_dist"] = sys.modules["configs"] = None
assert importlib.util.find_spec("mae_dist") is None

import jax.export
import numpy as np

for file, batches in zip(sys.argv[1::2], sys.argv[2::2]):
    exported = jax.export.deserialize(open(file, "rb").read())
    arguments = np.load(f"{file}.in.npz").values()
    results = {}
    for batch in map(int, batches.split(",")):
        for name, value in exported.call(*(argument[:batch] for argument in arguments)).items():
            results[f"{name} {batch}"] = value
    np.savez(f"{file}.out.npz", **results)
assert not [name for name in sys.modules if name.startswith(("mae_dist.", "configs."))]
"""


def run_here(monkeypatch, workdir, out, **values):
    """Runs the command in this process; its exit code."""
    monkeypatch.setattr(processes, "quiet_unless_primary", lambda: None)
    monkeypatch.setattr(cli, "given_config", lambda: None)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(workdir=str(workdir), out=str(out), **{"platforms": ["cpu"], **values}):
        return export.export([])


def batches_of(case):
    """The numbers of images that a file is run for."""
    return BATCHES[case.split()[-1]]


def draw(source):
    """(images uint8, batch of indices and images, ids of the patches in their order) of five images."""
    model = source.config.model
    images = np.random.default_rng(1).integers(0, 256, (5, *model.image_size, model.channels), np.uint8)
    index = np.arange(len(images), dtype=np.int32)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(source.config.seed), index)
    grid = patches.grid_size(model.image_size, model.patch_size)
    ids, _ = masking.draw_ids_shuffle(keys, strategy="random", grid=grid, mask_ratio=model.mask_ratio)
    return images, {"image": images, "index": index}, np.asarray(ids)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, child_env):
    """Every case written, and its results in another process: name -> (model, arrays by `<name> <batch>`)."""
    directory, sources = tmp_path_factory.mktemp("export"), {}
    for name, (fields, values) in CASES.items():
        source = sources[name] = in_memory(**fields)
        file = directory / name
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(export, "_check", lambda *_: None)  # what follows checks more, and this takes long
            run_here(monkeypatch, save(directory / f"{name}.run", source), file, **values)
        images, _, ids = draw(source)
        arguments = [images if values.get("input") != "float32" else (images / 255).astype(np.float32)]
        if values.get("what") == "reconstruction":
            noise = np.argsort(ids, axis=1) / ids.shape[1]  # lowest for the patch that comes first
            arguments.append(noise.astype(np.float32))
        np.savez(f"{file}.in.npz", *arguments)
    env = {name: value for name, value in child_env().items() if name != "PYTHONPATH"}
    arguments = [word for name in CASES for word in (name, ",".join(map(str, batches_of(name))))]
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return {name: (source, np.load(f"{directory / name}.out.npz")) for name, source in sources.items()}


def assert_results(case, results, wanted):
    """For each number of images the first rows of what is wanted."""
    assert sorted(results) == sorted(f"{name} {batch}" for name in wanted for batch in batches_of(case))
    for name, value in wanted.items():
        for batch in batches_of(case):
            found = results[f"{name} {batch}"]
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, value[:batch], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("encoder")])
def test_encoder(exported, case):
    """What Encoder.features gives, of each kind that the model has."""
    source, results = exported[case]
    ours, (images, _, _) = encoder.Encoder(source), draw(source)
    kinds = [kind for kind in KINDS if kind != "cls" or source.config.model.cls_token != "none"]
    assert_results(case, results, {kind: ours.features(images, kind) for kind in kinds})


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("reconstruction")])
def test_reconstruction(exported, case):
    """What a run's own pictures show for the same masks; the number of removed patches is the model's."""
    source, results = exported[case]
    _, batch, ids = draw(source)
    task = make_task(source.config, 0, PLAIN)
    assert task.reconstruct is not None
    pictures = jax.jit(task.reconstruct, compiler_options=QUICK)(source.load_whole(), batch)
    length = ids.shape[1]
    kept = masking.num_keep(length, source.config.model.mask_ratio)
    mask = np.ones(ids.shape, np.float32)
    np.put_along_axis(mask, ids[:, :kept], 0, axis=1)
    assert_results(case, results, {**jax.tree.map(np.asarray, pictures), "mask": mask})
    assert results["mask 5"].sum(1).tolist() == [length - kept] * 5


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """The workdir of a fine-tuning."""
    return save(tmp_path_factory.mktemp("classifier") / "run", in_memory(**SCALING, task="finetune"))


def test_the_command_says_what_it_wrote(classifier, tmp_path, monkeypatch, capsys):
    """For several platforms in one file, and what the function takes and gives."""
    assert run_here(monkeypatch, classifier, tmp_path / "new" / "out", platforms=["cpu", "cuda", "tpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{classifier}, step 0: encoder for cpu, cuda, tpu in {tmp_path / 'new' / 'out'} (0.")
    assert sorted(lines[1:]) == [
        "  gives cls: float32 (b, 32)",
        "  gives mean: float32 (b, 32)",
        "  gives patches: float32 (b, 4, 4, 32)",
        "  takes images: uint8 (b, 16, 16, 3)",
    ]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_a_platform_that_is_not_here_is_not_run(classifier, tmp_path, monkeypatch, caplog):
    """The file for it is written all the same, and that it was not tried is said."""
    assert run_here(monkeypatch, classifier, tmp_path / "out", platforms=["tpu"]) == 0
    assert "written for tpu and not run: this is cpu" in caplog.text
    assert jax.export.deserialize(bytearray((tmp_path / "out").read_bytes())).platforms == ("tpu",)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"what": "reconstruction"}, "has no decoder, .* use --what=encoder"),
        ({"platforms": ["gpu"]}, "--platforms=gpu: choose of cpu, cuda, rocm and tpu"),
        ({"platforms": []}, "--platforms=: choose of"),
    ],
)
def test_what_cannot_be_is_refused(classifier, tmp_path, monkeypatch, values, words):
    """One message with the cure, code 2, and nothing left behind."""
    with pytest.raises(ConfigError, match=words) as error:
        run_here(monkeypatch, classifier, tmp_path / "out", **values)
    assert error.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_not_touched(classifier, tmp_path, monkeypatch):
    """Not even by a file that would be right."""
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match="out exists already"):
        run_here(monkeypatch, classifier, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("corruption", ["other weights", "cut off"])
def test_a_corrupted_file_is_not_left(classifier, tmp_path, monkeypatch, corruption):
    """It is read back and run before it gets its name."""
    weight = np.asarray(jax.tree.leaves(in_memory(**SCALING, task="finetune").load_whole()["encoder"])[0]).tobytes()
    write = export.write_bytes_atomically

    def write_corrupted(path, data):
        assert weight in data
        write(
            path, data.replace(weight, bytes(len(weight))) if corruption == "other weights" else data[: len(data) // 2]
        )

    monkeypatch.setattr(export, "write_bytes_atomically", write_corrupted)
    with pytest.raises(Exception) as error:  # noqa: PT011 (what reading raises is not ours)
        run_here(monkeypatch, classifier, tmp_path / "out")
    assert corruption != "other weights" or "differs by" in str(error.value)
    assert list(tmp_path.iterdir()) == []
