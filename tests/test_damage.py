"""Damaged checkpoints: always noticed, put away, and the newest good one goes on."""

import gc
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from configs import default
from mae_dist import integrity
from mae_dist.errors import StorageFault
from mae_dist.saved import check_readable, load_params
from mae_dist.seals import Seals
from tests.runs import ONLY_UPDATES, records, run
from tests.test_checkpoint import build, new_state, open_checkpoints, save

# After a read that failed, tensorstore complains at its own time.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _collect():
    """Their complaints belong to this file's tests, not to whichever comes next."""
    yield
    gc.collect()


def restore(workdir):
    """(step, arrays) of what a run would continue from, or None."""
    built = build()
    with open_checkpoints(workdir) as checkpoints:
        restored = checkpoints.restore(
            built.abstract_state, built.shardings, built.config, built.fingerprint, default.get_config()
        )
    return restored and (restored[1], [np.asarray(leaf) for leaf in jax.tree.leaves(restored[0])])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with steps 1 and 2, and what each of them holds."""
    workdir = epath.Path(tmp_path_factory.mktemp("saved") / "run")
    workdir.mkdir()
    built, held = build(), {}
    (workdir / "config.json").write_text(built.meta["config"])
    with open_checkpoints(workdir) as checkpoints:
        for step in (1, 2):
            state = new_state(built)
            state = state.replace(params=jax.tree.map(lambda x, step=step: x + step, state.params))
            checkpoints.save(step, state, built.meta, {})
            held[step] = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
            checkpoints.wait()
    return workdir, held


def copy_of(saved, tmp_path_factory):
    workdir = epath.Path(tmp_path_factory.mktemp("copy") / "run")
    shutil.copytree(saved[0], workdir)
    return workdir


def assert_holds(found, held):
    step, arrays = found
    for a, b in zip(arrays, held[step], strict=True):
        np.testing.assert_array_equal(a, b)


def damage_one(path, kind, data):
    """Does to one file of a checkpoint, or to the whole, what a fault does."""
    written = list(integrity.files(path))
    victim = written[data.draw(st.integers(0, len(written) - 1))]
    content = victim.read_bytes()
    if kind == "flip" and content:
        at = data.draw(st.integers(0, len(content) - 1))
        flipped = content[at] ^ data.draw(st.integers(1, 255))
        victim.write_bytes(content[:at] + bytes([flipped]) + content[at + 1 :])
    elif kind == "truncate" and content:
        victim.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    elif kind == "empty":
        shutil.rmtree(path)
        path.mkdir()
    elif kind == "foreign":
        shutil.rmtree(path)
        (path / "photos").mkdir(parents=True)
        (path / "photos" / "cat.jpg").write_bytes(b"no checkpoint")
    elif kind == "no meta":
        shutil.rmtree(path / "meta")
    elif kind == "half":
        for file in written:
            if file == victim or data.draw(st.booleans()):
                file.unlink()
    else:
        victim.unlink()


KINDS = ["flip", "truncate", "missing", "empty", "foreign", "no meta", "half"]
RARELY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(RARELY, max_examples=20)
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_any_damage_is_noticed(saved, tmp_path_factory, kind, data):
    """A byte, a file or all of it: the step before goes on, and the damaged one is put away with a reason."""
    workdir = copy_of(saved, tmp_path_factory)
    damage_one(workdir / "checkpoints" / "2", kind, data)
    found = restore(workdir)
    assert found is not None
    assert found[0] == 1
    assert_holds(found, saved[1])
    (reason,) = Seals(workdir).quarantined().values()
    assert reason
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["1"]
    assert len([path for path in (workdir / "quarantine").iterdir() if path.is_dir()]) == 1


@settings(RARELY, max_examples=12)
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_damage_without_a_seal(saved, tmp_path_factory, kind, data):
    """Killed before the seal, the arrays' own digests decide: what goes on is exactly what was saved."""
    workdir = copy_of(saved, tmp_path_factory)
    shutil.rmtree(workdir / "seals")
    damage_one(workdir / "checkpoints" / "2", kind, data)
    found = restore(workdir)
    assert found is not None
    assert_holds(found, saved[1])


def test_nothing_good_left(saved, tmp_path_factory):
    """Never silently from scratch: an error, and the same one the next time, until the user gives them up."""
    workdir = copy_of(saved, tmp_path_factory)
    for step in ("1", "2"):
        shutil.rmtree(workdir / "checkpoints" / step / "state")
    for _ in range(2):
        with pytest.raises(StorageFault, match=r"no good checkpoint any more; in quarantine beside it: 1_.*, 2_"):
            restore(workdir)
    assert Seals(workdir).empty_quarantine() == 2
    assert restore(workdir) is None


def test_intact_but_unreadable_is_no_damage(saved, tmp_path_factory, monkeypatch):
    """Files as they were written that this version cannot read are not thrown away."""
    workdir = copy_of(saved, tmp_path_factory)

    def fail(*args):
        raise ValueError("another tree")

    monkeypatch.setattr("mae_dist.saved.restore", fail)
    with pytest.raises(StorageFault, match=r"checkpoints/2 cannot be .*another tree"):
        restore(workdir)
    assert not Seals(workdir).quarantined()


def test_wrong_from_the_start(saved, tmp_path_factory):
    """What was written well but was not what was meant, as by a fault of memory: the arrays' digests tell."""
    workdir = copy_of(saved, tmp_path_factory)
    path = workdir / "checkpoints" / "2"
    meta = path / "meta" / "metadata"
    text = meta.read_text()
    at = text.index('"params.') + text[text.index('"params.') :].index(': "') + 3
    meta.write_text(text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :])
    Seals(workdir).seal(2)
    found = restore(workdir)
    assert found is not None
    assert found[0] == 1
    assert "damaged" in next(iter(Seals(workdir).quarantined().values()))


def _without(name):
    return lambda path: next(path.rglob(name)).unlink()


@pytest.mark.parametrize(
    ("breaks", "says"),
    [
        (lambda path: (path / "state" / "manifest.ocdbt").unlink(), "array|chunk|NOT_FOUND|Metadata"),
        (lambda path: [file.unlink() for file in path.rglob("d/*")], "chunk|NOT_FOUND"),
        (lambda path: [os.truncate(file, file.stat().st_size // 2) for file in path.rglob("d/*")], "chunk|DATA_LOSS|."),
        (_without("_METADATA"), "."),
        (lambda path: os.truncate(path / "state" / "_METADATA", 100), "."),
        (lambda path: (path / "meta" / "metadata").unlink(), "metadata"),
    ],
)
def test_what_cannot_be_read_back(saved, tmp_path_factory, breaks, says):
    """A checkpoint is good only when every chunk of every array is there."""
    path = copy_of(saved, tmp_path_factory) / "checkpoints" / "2"
    names = json.loads((path / "meta" / "metadata").read_text())["digests"].keys()
    check_readable(path, names)
    with pytest.raises(StorageFault, match=r"cannot be read back: array params\.none is missing"):
        check_readable(path, [*names, "params.none"])
    breaks(Path(path))
    with pytest.raises(StorageFault, match=f"cannot be read back: .*({says})"):
        check_readable(path, names)


def test_a_save_that_cannot_be_read_back_has_failed(workdir):
    """Orbax finds nothing to merge below such a name, and goes on: no manifest vouches for what is left."""
    workdir = workdir / "lr=[1e-3]"
    built = build()
    with pytest.raises(StorageFault, match="written but cannot be read back"), open_checkpoints(workdir) as checkpoints:
        save(checkpoints, built, new_state(built), 1)
    assert not Seals(workdir).steps()
    assert not [name for name in os.listdir(workdir / "checkpoints") if name.isdigit()]


def test_each_process_digests_what_it_wrote(saved, tmp_path_factory):
    """Together all files, none of them twice; and each reads its part of them back."""
    workdir = copy_of(saved, tmp_path_factory)
    state = workdir / "checkpoints" / "2" / "state"
    shutil.copytree(state / "ocdbt.process_0", state / "ocdbt.process_1")
    seals = Seals(workdir)
    own = [seals.digest_own(2, process, 2) or {} for process in range(2)]
    assert {name.split("/")[1] for name in own[1]} == {"ocdbt.process_1"}
    assert not own[0].keys() & own[1].keys()
    assert own[0] | own[1] == integrity.file_digests(workdir / "checkpoints" / "2")
    seals.write(2, own)
    assert [seals.damage(2, process, 2) for process in range(2)] == [[], []]
    flip = Path(state / "ocdbt.process_1" / "manifest.ocdbt")
    flip.write_bytes(flip.read_bytes()[:-1])
    assert [seals.damage(2, process, 2) for process in range(2)].count([]) == 1
    assert len(seals.damage(2) or []) == 1


def test_sealing_what_is_deleted_meanwhile(saved, tmp_path_factory, monkeypatch):
    """Retention may delete a checkpoint while its files are read: no fault; a file that goes alone is one."""
    workdir = copy_of(saved, tmp_path_factory)
    whole = integrity.files

    def one_goes(directory):
        for path in whole(directory):
            path.unlink()
            yield path

    monkeypatch.setattr(integrity, "files", one_goes)
    with pytest.raises(FileNotFoundError):
        Seals(workdir).seal(2)

    def all_go(directory):
        for path in list(whole(directory)):
            shutil.rmtree(directory, ignore_errors=True)
            yield path

    monkeypatch.setattr(integrity, "files", all_go)
    Seals(workdir).seal(1)
    assert not (workdir / "checkpoints" / "1").exists()


def test_readers_take_a_good_one(saved, tmp_path_factory):
    """An encoder for a probe comes from the newest good checkpoint; readers move nothing."""
    workdir = copy_of(saved, tmp_path_factory)
    shutil.rmtree(workdir / "checkpoints" / "2" / "meta")
    built = build()
    step, _ = load_params(workdir, built.abstract_state.params, built.shardings.params)
    assert step == 1
    assert (workdir / "checkpoints" / "2").exists()


def test_digests_do_not_depend_on_the_mesh():
    """The digest of a value is that of its parts wherever they are."""
    state = new_state(build())
    wanted = integrity.digests(state)
    assert integrity.digests(jax.device_put(state, build((2, 2, 2)).shardings)) == wanted
    assert len(set(wanted.values())) > 20  # the moments are all zero yet
    assert all(name.startswith(("params.", "opt_state.", "step")) for name in wanted)


def test_a_first_save_compiles_one_small_program(workdir, caplog):
    """One for each shape, and for each array that replicas would share the writing of, took seconds."""
    built = build((2, 1, 1))
    state = new_state(built)
    integrity._chunk_program.cache_clear()
    with jax.log_compiles(), caplog.at_level("WARNING"), open_checkpoints(workdir) as checkpoints:
        save(checkpoints, built, state, 1)
    compiled = [text for text in caplog.messages if text.startswith("Finished XLA compilation")]
    assert len(compiled) <= 1, compiled


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_digests_take_no_memory_to_speak_of(dtype):
    """On an accelerator a state fills the device: nothing of its size fits beside it."""
    mesh = build((2, 2, 2)).mesh
    for spec in (PartitionSpec(), PartitionSpec("fsdp", "tensor")):
        sharding = NamedSharding(mesh, spec)
        program = integrity._array_program((1024, 2048), jnp.dtype(dtype), sharding)
        memory = program.memory_analysis()
        assert memory is not None
        assert memory.temp_size_in_bytes < 1024


@given(
    shape=st.lists(st.integers(1, 5), max_size=3).map(tuple),
    dtype=st.sampled_from(["float32", "int32", "bfloat16", "uint8", "bool"]),
    data=st.data(),
)
@settings(RARELY, max_examples=40)
def test_any_bit_changes_the_digest(shape, dtype, data):
    """A single changed bit, always; two values that change places, too."""
    size = int(np.prod(shape))
    x = np.asarray(jnp.arange(size).astype(dtype)).reshape(shape)
    bits = x.copy().reshape(-1).view(np.uint8)
    at = data.draw(st.integers(0, bits.size - 1))
    bits[at] ^= 1 if dtype == "bool" else 1 << data.draw(st.integers(0, 7))
    changed = bits.view(x.dtype).reshape(shape)
    first, second = (integrity.digests([jnp.asarray(value)]) for value in (x, changed))
    assert first != second
    if size > 1 and dtype != "bool":
        assert integrity.digests([jnp.asarray(x.reshape(-1)[::-1].reshape(shape))]) != first


def test_command(saved, tmp_path_factory, child_env):
    """A user finds a flipped byte, the run goes on without that step, and the quarantine can be emptied."""
    workdir = tmp_path_factory.mktemp("command") / "run"
    options = ("--config=configs/smoke.py", *ONLY_UPDATES, "--config.checkpoint.every_steps=2", f"--workdir={workdir}")
    code, output = run(child_env(), *options, "--config.total_steps=4")
    assert code == 0, output
    code, output = run(child_env(), "verify", str(workdir), module="checkpoint")
    assert (code, output.count("good")) == (0, 2), output
    assert "not sealed" not in output
    victim = max((workdir / "checkpoints" / "4").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    code, output = run(child_env(), "verify", str(workdir), module="checkpoint")
    assert (code, output.count("good"), output.count("DAMAGED")) == (5, 1, 1), output
    code, output = run(child_env(), *options, "--config.total_steps=6")
    assert code == 0, output
    assert "DAMAGED CHECKPOINT: step 4" in output
    assert "Continuing from step 2" in output
    steps = [record["step"] for record in records(workdir)]
    assert steps == sorted(set(steps))
    code, output = run(child_env(), "list", str(workdir), module="checkpoint")
    assert (code, output.count("in quarantine")) == (0, 1), output
    code, output = run(child_env(), "rm-quarantine", str(workdir), module="checkpoint")
    assert (code, output) == (0, "1 checkpoints deleted from quarantine\n")
    code, output = run(child_env(), "list", str(workdir / "nothing"), module="checkpoint")
    assert code == 5, output
