"""Corrupted checkpoints: always noticed, put away, and the newest good one goes on."""

import gc
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mae_dist.checkpoint import digests
from mae_dist.checkpoint import reader as saved_lib
from mae_dist.checkpoint.manifests import Manifests
from mae_dist.checkpoint.reader import load_params
from mae_dist.errors import StorageFault
from mae_dist.parallel import shardings
from tests.runs import ONLY_UPDATES, records, run
from tests.test_checkpoint import build, new_state, open_checkpoints, save


@pytest.fixture(autouse=True)
def _collect():
    """Their complaints belong to this file's tests, not to whichever comes next."""
    yield
    gc.collect()


def restore(workdir):
    """(step, arrays) of what a run would continue from, or None."""
    built = build()
    with open_checkpoints(workdir) as checkpoints:
        restored = checkpoints.restore(built.abstract_state, built.shardings, built.config, built.fingerprint)
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


def write_manifest(workdir, step):
    """Makes what is there what was written."""
    manifests = Manifests(workdir)
    manifests.write(step, [manifests.digest_files(step)])


def assert_holds(found, held):
    step, arrays = found
    for a, b in zip(arrays, held[step], strict=True):
        np.testing.assert_array_equal(a, b)


def corrupt_one(path, kind, data):
    """Does to one file of a checkpoint, or to the whole, what a fault does."""
    written = list(digests.files(path))
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


@settings(RARELY, max_examples=settings().max_examples // 5)
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_any_corruption_is_noticed(saved, tmp_path_factory, kind, data):
    """A byte, a file or all of it: the step before goes on, and the corrupted one is put away with a reason."""
    workdir = copy_of(saved, tmp_path_factory)
    corrupt_one(workdir / "checkpoints" / "2", kind, data)
    found = restore(workdir)
    assert found is not None
    assert found[0] == 1
    assert_holds(found, saved[1])
    (reason,) = Manifests(workdir).quarantined().values()
    assert reason
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["1"]
    assert len([path for path in (workdir / "quarantine").iterdir() if path.is_dir()]) == 1


@settings(RARELY, max_examples=settings().max_examples // 8)
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_corruption_without_a_seal(saved, tmp_path_factory, kind, data):
    """Killed before the manifest, the arrays' own digests decide: what goes on is exactly what was saved."""
    workdir = copy_of(saved, tmp_path_factory)
    shutil.rmtree(workdir / "seals")
    corrupt_one(workdir / "checkpoints" / "2", kind, data)
    found = restore(workdir)
    assert found is not None
    assert_holds(found, saved[1])


def cut_short(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def largest(directory):
    return max(digests.files(directory), key=lambda path: path.stat().length)


BREAKS = {
    "not merged": lambda path: (path / "state" / "manifest.ocdbt").unlink(),
    "a data file is missing": lambda path: largest(path / "state" / "ocdbt.process_0" / "d").unlink(),
    "a data file is cut short": lambda path: cut_short(largest(path / "state" / "ocdbt.process_0" / "d")),
    "the index is cut short": lambda path: cut_short(largest(path / "state" / "d")),
    "the tree is cut short": lambda path: cut_short(path / "state" / "_METADATA"),
    "the meta is cut short": lambda path: cut_short(path / "meta" / "metadata"),
    "the meta is missing": lambda path: (path / "meta" / "metadata").unlink(),
}


# Where one of Orbax's reads fails it abandons the others, which raise when they are collected.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. .coroutine object _read_array:pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("how", BREAKS)
def test_what_cannot_be_read_back(saved, tmp_path_factory, how):
    """Is found by looking at every array and chunk, without reading them."""
    path = copy_of(saved, tmp_path_factory) / "checkpoints" / "2"
    names = digests.digests(new_state(build())).keys()
    saved_lib.check_readable(path.parent, 2, names)
    BREAKS[how](path)
    with pytest.raises(StorageFault, match=rf"checkpoint {path} was written but cannot be read back: \S"):
        saved_lib.check_readable(path.parent, 2, names)
    gc.collect()


def test_an_array_that_was_left_out(saved):
    """Is missed, although all that is there can be read."""
    with pytest.raises(StorageFault, match=r"cannot be read back: array params\.another is missing"):
        saved_lib.check_readable(saved[0] / "checkpoints", 2, ["step", "params.another"])


def test_a_save_that_cannot_be_read_back_has_failed(workdir, monkeypatch, caplog):
    """It is tried again, at last a fault; it never gets its name or a manifest, and deletes nothing that is older."""
    check, broken = saved_lib.check_readable, []

    def break_and_check(directory, step, names):
        if not broken:
            broken.extend(directory.glob(f"{step}*"))
            BREAKS["not merged"](broken[0])
        check(directory, step, names)

    built = build()
    with open_checkpoints(workdir, keep_latest=1) as checkpoints:
        checkpoints.save(1, new_state(built), built.meta, {}, wait=True)
        monkeypatch.setattr(saved_lib, "check_readable", break_and_check)
        checkpoints.save(2, new_state(built), built.meta, {})
        with pytest.raises(StorageFault, match=r"checkpoints/2.* was written but cannot be read back"):
            checkpoints.wait()
    assert saved_lib.steps(workdir) == [1]
    assert [path.name for path in (workdir / "seals").iterdir()] == ["1.json"]
    found = restore(workdir)
    assert found is not None
    assert found[0] == 1
    broken.clear()
    with open_checkpoints(workdir, retries=1, keep_latest=1) as checkpoints:
        checkpoints.save(2, new_state(built), built.meta, {}, wait=True)
    assert "A SAVE FAILED" in caplog.text
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["2"]
    assert saved_lib.condition(workdir, 2) == []


def test_a_directory_that_orbax_reads_as_a_pattern(workdir):
    """Its merge finds nothing below such a name, and goes on: no manifest vouches for what is left."""
    workdir, built = workdir / "lr=[1e-3]", build()
    with pytest.raises(StorageFault, match="written but cannot be read back"), open_checkpoints(workdir) as checkpoints:
        save(checkpoints, built, new_state(built), 1)
    assert not Manifests(workdir).steps()
    assert not saved_lib.steps(workdir)


def test_nothing_good_left(saved, tmp_path_factory):
    """Never silently from scratch: an error, and the same one the next time, until the user gives them up."""
    workdir = copy_of(saved, tmp_path_factory)
    for step in ("1", "2"):
        shutil.rmtree(workdir / "checkpoints" / step / "state")
    for _ in range(2):
        with pytest.raises(StorageFault, match=r"no good checkpoint any more; in quarantine beside it: 1_.*, 2_"):
            restore(workdir)
    assert Manifests(workdir).empty_quarantine() == 2
    assert restore(workdir) is None


def test_intact_but_unreadable_is_not_corrupted(saved, tmp_path_factory, monkeypatch):
    """Files as they were written that this version cannot read are not thrown away."""
    workdir = copy_of(saved, tmp_path_factory)

    def fail(*args):
        raise ValueError("another tree")

    monkeypatch.setattr("mae_dist.checkpoint.reader.restore", fail)
    with pytest.raises(StorageFault, match=r"checkpoints/2 cannot be .*another tree"):
        restore(workdir)
    assert not Manifests(workdir).quarantined()


def test_wrong_from_the_start(saved, tmp_path_factory):
    """What was written well but was not what was meant, as by a fault of memory: the arrays' digests tell."""
    workdir = copy_of(saved, tmp_path_factory)
    path = workdir / "checkpoints" / "2"
    meta = path / "meta" / "metadata"
    text = meta.read_text()
    at = text.index('"params.') + text[text.index('"params.') :].index(': "') + 3
    meta.write_text(text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :])
    write_manifest(workdir, 2)
    found = restore(workdir)
    assert found is not None
    assert found[0] == 1
    assert "corrupted" in next(iter(Manifests(workdir).quarantined().values()))


def test_readers_take_a_good_one(saved, tmp_path_factory):
    """An encoder for a probe comes from the newest good checkpoint; readers move nothing."""
    workdir = copy_of(saved, tmp_path_factory)
    shutil.rmtree(workdir / "checkpoints" / "2" / "meta")
    built = build()
    step, _ = load_params(workdir, built.abstract_state.params, built.shardings.params)
    assert step == 1
    assert (workdir / "checkpoints" / "2").exists()


def test_manifest_of_several_processes(saved, tmp_path_factory):
    """Each digests the files that it wrote, and all files are somebody's; whoever verifies them later, and how many."""
    workdir = copy_of(saved, tmp_path_factory)
    state = workdir / "checkpoints" / "2" / "state"
    for name in ("ocdbt.process_1", "ocdbt.process_10"):
        shutil.copytree(state / "ocdbt.process_0", state / name)
    manifests = Manifests(workdir)
    parts = [manifests.digest_files(2, process, 2) for process in range(2)]
    assert all(name.startswith("state/ocdbt.process_1/") for name in parts[1])
    assert not parts[0].keys() & parts[1].keys()
    whole = digests.file_digests(workdir / "checkpoints" / "2")
    assert parts[0] | parts[1] == whole
    manifests.write(2, parts)
    for count in (1, 2, 3):
        assert [manifests.faults(2, process, count) for process in range(count)] == [[]] * count
    cut_short(largest(state))
    (state / "new").write_text("")
    (state / "_sharding").unlink()
    for count in (1, 2, 3):
        assert len([line for process in range(count) for line in manifests.faults(2, process, count) or ()]) == 3


def test_digests_stay_what_they_were():
    """Checkpoints hold them: of every type, on one device and on many."""
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    tree = {"float32": x, "bfloat16": jnp.asarray(x, jnp.bfloat16), "bool": x > 3, "scalar": np.int32(7)}
    assert digests.digests(tree) == {
        "float32": "589e5ad1d516281a",
        "bfloat16": "4050d1452586da3e",
        "bool": "550fa1f3ab6ddb6d",
        "scalar": "18c9aec49641e981",
    }
    large = np.arange(300_000, dtype=np.int32)  # several chunks
    split = jax.NamedSharding(jax.make_mesh((8,), ("x",)), jax.P("x"))
    for where in (jax.devices()[0], split):
        array = jax.device_put(large, where)
        assert digests.digests([array]) == {"0": "93d663ec05f3d950"}
        assert "{:08x}{:08x}".format(*digests.sums_on_devices(array).tolist()) == "93d663ec05f3d950"


def test_digests_take_no_memory_to_speak_of():
    """On devices that a state fills, nothing like a copy of an array, split over devices or whole."""
    for shape in ((1, 1, 1), (2, 2, 2)):
        built = build(shape, model__embed_dim=128)
        arrays = jax.tree.leaves(shardings.with_shardings(built.abstract_state, built.shardings))
        for array in {(array.shape, array.dtype, array.sharding): array for array in arrays}.values():
            memory = digests.sums_on_devices.lower(array).compile().memory_analysis()
            assert memory is not None
            assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 2**10


def test_digests_do_not_depend_on_the_mesh():
    """The digest of a value is that of its parts wherever they are."""
    state = new_state(build())
    wanted = digests.digests(state)
    assert digests.digests(jax.device_put(state, build((2, 2, 2)).shardings)) == wanted
    assert len(set(wanted.values())) > 20
    assert all(name.startswith(("params.", "opt_state.", "step")) for name in wanted)


@given(
    shape=st.lists(st.integers(1, 5), max_size=3).map(tuple),
    dtype=st.sampled_from(["float32", "int32", "bfloat16", "uint8", "bool"]),
    data=st.data(),
)
@settings(RARELY, max_examples=2 * settings().max_examples // 5)
def test_any_bit_changes_the_digest(shape, dtype, data):
    """A single changed bit, always; two values that change places, too."""
    size = int(np.prod(shape))
    x = np.asarray(jnp.arange(size).astype(dtype)).reshape(shape)
    bits = x.copy().reshape(-1).view(np.uint8)
    at = data.draw(st.integers(0, bits.size - 1))
    bits[at] ^= 1 if dtype == "bool" else 1 << data.draw(st.integers(0, 7))
    changed = bits.view(x.dtype).reshape(shape)
    first, second = (digests.digests([jnp.asarray(value)]) for value in (x, changed))
    assert first != second
    if size > 1 and dtype != "bool":
        assert digests.digests([jnp.asarray(x.reshape(-1)[::-1].reshape(shape))]) != first


@pytest.mark.long
def test_command(saved, tmp_path_factory, child_env):
    """A user finds a flipped byte, the run goes on without that step, and the quarantine can be emptied."""
    workdir = tmp_path_factory.mktemp("command") / "run"
    options = ("--config=configs/smoke.py", *ONLY_UPDATES, "--config.checkpoint.every_steps=2", f"--workdir={workdir}")
    code, output = run(child_env(), *options, "--config.total_steps=4")
    assert code == 0, output
    code, output = run(child_env(), "verify", str(workdir), module="checkpoint")
    assert (code, output.count("good")) == (0, 2), output
    assert "no manifest" not in output
    victim = max((workdir / "checkpoints" / "4").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    code, output = run(child_env(), "verify", str(workdir), module="checkpoint")
    assert (code, output.count("good"), output.count("CORRUPTED")) == (5, 1, 1), output
    code, output = run(child_env(), *options, "--config.total_steps=6")
    assert code == 0, output
    assert "CORRUPTED CHECKPOINT: step 4" in output
    assert "Continuing from step 2" in output
    steps = [record["step"] for record in records(workdir)]
    assert steps == sorted(set(steps))
    code, output = run(child_env(), "list", str(workdir), module="checkpoint")
    assert (code, output.count("in quarantine")) == (0, 1), output
    code, output = run(child_env(), "rm-quarantine", str(workdir), module="checkpoint")
    assert (code, output) == (0, "1 checkpoints deleted from quarantine\n")
    code, output = run(child_env(), "list", str(workdir / "nothing"), module="checkpoint")
    assert code == 5, output
