"""Compiled steps as files: planned, loaded by real trainings, and refused where they are not for the run."""

import json
import os
import pickle
import subprocess
import sys
from importlib.util import find_spec

import jax
import numpy as np
import pytest
from etils import epath

from mae_dist.data.from_config import open_data
from mae_dist.errors import EXIT_CONFIG, ConfigError
from mae_dist.parallel.shardings import with_shardings
from mae_dist.plan import planning, topology
from mae_dist.training import job, saved_program
from tests import QUICK
from tests.runs import ONLY_UPDATES, ROOT, first_batch, free_port, records, run, smoke_config

ARGS = ("--config=configs/smoke.py", "--config.model.depth=1", "--config.eval.batch_size=32")
TRAIN = (*ARGS, *ONLY_UPDATES, "--config.total_steps=3", "--config.log_every_steps=1")
SMALL = {"model__depth": 1, "model__decoder_depth": 1}


@pytest.fixture(scope="module")
def place(child_env, tmp_path_factory):
    """A training that compiles, and the step that plan saves after it."""
    place = tmp_path_factory.mktemp("saved")
    code, output = run(child_env(2), *TRAIN, f"--workdir={place / 'compiles'}")
    assert code == 0, output
    # JAX has the program in its cache now, from which it would not be whole.
    code, output = run(child_env(2), *ARGS, "--topology=cpu:2", f"--save={place / 'step.bin'}", module="plan")
    assert code == 0, output
    assert f"train with --config.compiled_step={place / 'step.bin'}" in output
    return place


def test_a_training_loads_it(place, child_env):
    """And computes, bit for bit, what it does with its own."""
    args = (f"--config.compiled_step={place / 'step.bin'}", f"--workdir={place / 'loads'}")
    code, output = run(child_env(2), *TRAIN, *args)
    assert code == 0, output
    assert f"Loaded the compiled step from {place / 'step.bin'} in" in output
    assert records(place / "loads") == records(place / "compiles")
    assert len(records(place / "loads")) == 3


def test_a_training_of_another_batch_compiles(place, child_env):
    args = (f"--config.compiled_step={place / 'step.bin'}", f"--workdir={place / 'other'}")
    code, output = run(child_env(2), *TRAIN, *args, "--config.global_batch_size=64")
    assert code == 0, output
    assert "step.bin is not used, and the step is compiled here: it is another program" in output
    assert "global_batch_size: 32 -> 64" in output
    assert len(records(place / "other")) == 3


@pytest.mark.parametrize(
    ("module", "args", "said"),
    [
        ("main", ("--config.compiled_step=none.bin",), "compiled_step=none.bin: there is no such file; write it"),
        ("plan", ("--topology=cpu:2", "--save=none/step.bin"), "a file in a directory that exists is needed"),
        ("plan", ("--topology=cpu:2", "--save=step.bin", "--sweep"), "plan the one mesh to save, without --sweep"),
    ],
)
def test_what_cannot_work_is_said_at_the_start(child_env, tmp_path, module, args, said):
    workdir = (f"--workdir={tmp_path / 'run'}",) if module == "main" else ()
    code, output = run(child_env(2), *ARGS, *args, *workdir, module=module)
    assert code == EXIT_CONFIG, output
    assert said in output


def wire(devices=slice(0, 2), **changes):
    """A job on these of the eight devices, and its lowered step."""
    config = smoke_config(**SMALL, **changes)
    built = job.build(config, jax.devices()[devices], open_data(config))
    with jax.set_mesh(built.mesh):
        state = with_shardings(built.abstract_state, built.shardings)
        return built, built.train_step.lower(state, built.abstract_batch)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A saved step: its file, job, lowered and compiled program."""
    path = epath.Path(tmp_path_factory.mktemp("original")) / "step.bin"
    built, lowered = wire(compiled_step=str(path))
    compiled = lowered.compile(QUICK)
    saved_program.write(path, saved_program.Compilation(built, lowered, compiled, 1.0))
    return path, built, lowered, compiled


@pytest.fixture
def loaded(original, tmp_path, caplog, monkeypatch):
    """`loaded(content)`: what the original's run loads of a file with this content, and what it logs."""
    _, built, lowered, _ = original
    path = tmp_path / "step.bin"

    def load(content):
        path.write_bytes(content)
        path.chmod(0o600)
        with built.config.unlocked():
            monkeypatch.setitem(built.config, "compiled_step", str(path))
        caplog.clear()
        return saved_program.load(built, lowered), caplog.text

    return load


def with_manifest(content, **changes):
    """The same file with other values in its manifest."""
    head, _, program = content.partition(b"\n")
    manifest = json.loads(head)
    for name, value in changes.items():
        (manifest["needs"] if name in manifest["needs"] else manifest)[name] = value
    return json.dumps(manifest).encode() + b"\n" + program


def test_the_step_again(original):
    """With the state donated, as the compiled one."""
    path, built, lowered, compiled = original
    assert path.stat().mode & 0o777 == 0o600
    program = saved_program.load(built, lowered)
    assert program is not None
    state, batch = built.init_state(), first_batch(built)
    given = jax.tree.leaves(state.params)
    new, metrics = program(state, batch, built.train_step.hyperparams)
    expected, _ = compiled(built.init_state(), batch, built.train_step.hyperparams)
    assert all(leaf.is_deleted() for leaf in given)
    assert np.isfinite(metrics["loss"])
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.sharding == b.sharding


def test_a_file_that_is_not_whole(original, loaded):
    whole = original[0].read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for content in (whole[:-1], whole[:middle], flipped):
        assert loaded(content)[0] is None
        assert "it is truncated or corrupted: its SHA-256 is not that of its manifest" in loaded(content)[1]
    for content in (b"", b"{}\n", b"[1]\nx", b"PK\x03\x04" + bytes(99), whole[:100], b"1" + whole):
        assert loaded(content)[0] is None
        assert "it is not a file of plan --save, or it is corrupted" in loaded(content)[1]
    assert loaded(whole)[0] is not None


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("jax", "0.0.1", f"its jax version is '0.0.1', and here it is {jax.__version__!r}"),
        ("backend", "TPU", "its compiler is 'TPU', and here it is 'cpu'"),
        ("cpu", "another", "it was compiled on a CPU with other instruction sets; write it anew by plan --save"),
        ("flags", ["--xla_a=1"], "its XLA_FLAGS and LIBTPU_INIT_ARGS is ['--xla_a=1'], and here it is ["),
        ("program", "another", "it is another program; write it anew by plan --save"),
    ],
)
def test_what_it_was_compiled_with(original, loaded, name, value, said):
    program, log = loaded(with_manifest(original[0].read_bytes(), **{name: value}))
    assert program is None
    assert said in log


class Hostile:
    """Makes a file where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_nothing_is_unpickled_that_is_not_for_the_run(original, loaded, tmp_path, monkeypatch):
    """The control, which is for it, shows that the file is code: it has to be trusted."""
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps(Hostile())
    head = original[0].read_bytes().partition(b"\n")[0]
    hostile = with_manifest(head + b"\n" + content, sha256=saved_program.hashlib.sha256(content).hexdigest())
    for changed in (head + b"\n" + content, with_manifest(hostile, jax="0.0.1")):
        assert loaded(changed)[0] is None
        assert not (tmp_path / "unpickled").exists()
    program, log = loaded(hostile)
    assert program is None
    assert "JAX cannot load it: " in log
    assert (tmp_path / "unpickled").exists()


def test_a_file_that_others_may_write(original, caplog):
    path, built, lowered, _ = original
    os.chmod(path, 0o620)
    try:
        assert saved_program.load(built, lowered) is None
        assert "it is code, and belongs to others or is open to them" in caplog.text
    finally:
        os.chmod(path, 0o600)


@pytest.mark.parametrize(
    ("devices", "changes", "said"),
    [
        (slice(0, 4), {}, "its mesh is {'data': 2, 'fsdp': 1, 'tensor': 1}, and here it is {'data': 4,"),
        (slice(2, 4), {}, "its devices have other numbers or lie elsewhere in the mesh; write it anew"),
        (slice(0, 2), {"optim__b2": 0.9}, "it is another program (optim.b2: 0.95 -> 0.9); write it anew"),
    ],
)
def test_another_run(original, caplog, devices, changes, said):
    built, lowered = wire(devices, **changes, compiled_step=str(original[0]))
    assert saved_program.load(built, lowered) is None
    assert said in caplog.text


def test_a_run_that_differs_in_what_the_program_does_not_know(original):
    """Length, seed, rate, intervals and workdir: points of a sweep share the file."""
    changes = {"total_steps": 9, "seed": 3, "optim__base_lr": 1e-2, "eval__every_steps": 4, "name": "other"}
    assert saved_program.load(*wire(**changes, compiled_step=str(original[0]))) is not None


def test_no_file_is_asked_for(original):
    _, built, _, _ = original
    with built.config.unlocked():
        config = built.config.copy_and_resolve_references()
    config.compiled_step = ""
    saved_program.check_exists(config)
    config.compiled_step = str(original[0].parent)
    with pytest.raises(ConfigError, match="there is no such file"):
        saved_program.check_exists(config)


def test_a_program_that_jax_cannot_serialize(original, tmp_path):
    """One that calls back into this process."""
    _, built, lowered, _ = original
    path = epath.Path(tmp_path) / "step.bin"
    calls = jax.jit(lambda x: jax.pure_callback(np.sin, x, x)).lower(np.float32(1)).compile(QUICK)
    with pytest.raises(ConfigError, match=r"JAX cannot serialize this program \(.+\).* otherwise leave out --save"):
        saved_program.write(path, saved_program.Compilation(built, lowered, calls, 1.0))
    assert not path.exists()


PROCESS = """
import sys
import jax
from etils import epath
from mae_dist.parallel import processes
index, place = int(sys.argv[2]), epath.Path(sys.argv[3])
processes.initialize(f"127.0.0.1:{sys.argv[1]}", 2, index)
jax.config.update("jax_enable_compilation_cache", False)  # as plan --save does: what comes from it lacks functions
from mae_dist.training import saved_program
from tests.runs import first_batch
from tests.test_saved_program import wire
built, lowered = wire(compiled_step=str(place / f"step_{index}.bin"))
compiled = lowered.compile()
def write():
    for each in range(2):
        saved_program.write(place / f"step_{each}.bin", saved_program.Compilation(built, lowered, compiled, 1.0))
    return ""
processes.from_first("written", write, 60)
with jax.set_mesh(built.mesh):
    for program in (compiled, saved_program.load(built, lowered)):
        print("loss", program(built.init_state(), first_batch(built), built.train_step._placed)[1]["loss"].item())
    if index == 1:
        (place / "step_1.bin").write_bytes((place / "step_1.bin").read_bytes()[:-1])
    print(saved_program.load(built, lowered))
"""


@pytest.mark.long
def test_processes_agree(child_env, tmp_path):
    """Both load it, and neither does where the file of one is corrupted."""
    command = [sys.executable, "-c", PROCESS, str(free_port())]
    started = [
        subprocess.Popen(
            [*command, str(index), str(tmp_path)],
            env=child_env(),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    losses = []
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output
        *values, last = [line for line in output.splitlines() if line.startswith(("loss", "None", "<"))]
        assert last == "None", output
        losses += values
    assert len(losses) == 4
    assert len(set(losses)) == 1
    assert "process 1: it is truncated or corrupted" in outputs[0]


@pytest.mark.long
@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed (extra tpu)")
def test_a_step_for_tpus_is_written_here(caplog, tmp_path):
    """And is refused by the name of the chip, where there is none."""
    topology.use_no_accelerator()
    path, steps = epath.Path(tmp_path) / "step.bin", []
    config = smoke_config(**SMALL, compiled_step=str(path))
    planning.examine(config, topology.describe("v5e:2x2", 1), planning.described_data(config), steps.append)
    assert saved_program.write(path, steps[0]) > 1e6
    assert saved_program.load(*wire(slice(0, 4), compiled_step=str(path))) is None
    assert "its compiler is 'PJRT C API TFRT TPU v5 lite" in caplog.text
