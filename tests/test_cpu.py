"""How a CPU carries out what a config describes: faster, and the same numbers."""

import functools
import json
import os
import shutil
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_dist import hardware
from mae_dist.cpu import cores as cpu
from mae_dist.cpu import onednn, start
from mae_dist.data import local_rows, to_global
from mae_dist.data.from_config import open_data
from mae_dist.errors import ConfigError
from mae_dist.model import autoencoder, flops
from mae_dist.model.hooks import PLAIN
from mae_dist.tasks.make import make_task
from mae_dist.training import job
from tests import NO_PARITY, QUICK
from tests.runs import ONLY_UPDATES, losses, run, smoke_config


@given(examples=st.integers(1, 2000), size=st.integers(1, 2**40))
def test_pieces_divide_and_shrink(examples, size):
    """Any number of examples, any size: whole pieces, and never fewer of them for larger examples."""
    pieces = cpu.num_pieces(examples, size)
    assert examples % pieces == 0
    assert cpu.num_pieces(examples, 2 * size) >= pieces
    assert cpu.num_pieces(examples, 2**60) == examples
    assert cpu.num_pieces(examples, 1) == 1 or examples > cpu.cache_bytes()
    assert cpu.num_pieces(examples, 2**60, summed_tokens=64) <= max(1, examples // 4)  # 256 tokens in a piece
    assert cpu.num_pieces(examples, size, summed_tokens=10_000) == pieces


@pytest.mark.parametrize(
    ("said", "counted", "images"),
    [("512K\n", 2**19, 16), ("1M", 2**20, 32), ("2048K\n", 2**20, 32), ("", 2**20, 32), ("all of it", 2**20, 32)],
)
def test_a_large_cache_makes_no_larger_pieces(monkeypatch, said, counted, images):
    """Pieces of configs/cifar_small.py on one of two cores: those of 64 that would fill 2 MiB are slower."""
    monkeypatch.setattr(cpu.Path, "read_text", lambda self: said)
    assert cpu.cache_bytes() == counted
    size = flops.activation_bytes(num_tokens=65, embed_dim=64, num_heads=4, mlp_ratio=2.0)
    assert 128 // cpu.num_pieces(128, size, summed_tokens=17) == images


@pytest.fixture
def machine(monkeypatch):
    """A machine of eight cores without accelerator, whose JAX has not started."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(cpu, "num_cores", lambda: 8)
    return monkeypatch


@pytest.mark.parametrize(
    ("wanted", "batches", "devices"),
    [
        (0, ((256, 1), (512, 1)), 8),
        (0, ((256, 1), (100, 1)), 4),
        (0, ((64, 1), (64, 1)), 4),
        (0, ((8, 1), (256, 1)), 1),
        (0, ((254, 1), (254, 1)), 2),
        (0, ((250, 2), (250, 1)), 5),
        (0, ((254, 2), (254, 1)), 1),  # 127 pairs
        (0, ((251, 2), (251, 1)), 1),  # pairs there are none: the check of the mesh tells
        (3, ((256, 1),), 3),
    ],
)
def test_devices(machine, wanted, batches, devices):
    """As many as divide the batches and leave each enough; what is asked for otherwise."""
    assert cpu.num_devices(wanted, batches) == devices


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("JAX_PLATFORMS", "tpu"),
        ("JAX_PLATFORMS", "cuda,cpu"),
        ("XLA_FLAGS", "--xla_force_host_platform_device_count=3"),
    ],
)
def test_not_on_accelerators_nor_against_the_user(machine, variable, value):
    machine.setenv(variable, value)
    assert cpu.num_devices(0, ((256, 1),)) == 0
    assert os.environ[variable] == value


@pytest.mark.parametrize(("chips", "devices"), [(("accel0",), 0), (("vfio",), 8)])
def test_libtpu_is_no_tpu(machine, tmp_path, chips, devices):
    """It also compiles for TPUs that are not here: only a chip counts."""
    for name in chips:
        (tmp_path / name).touch()
    machine.delenv("JAX_PLATFORMS")
    machine.setattr(hardware, "find_spec", lambda name: name if name == "libtpu" else None)
    machine.setattr(hardware, "_TPU_CHIPS", (f"{tmp_path}/accel[0-9]*", f"{tmp_path}/vfio/[0-9]*"))
    assert cpu.num_devices(0, ((256, 1),)) == devices


@pytest.mark.parametrize(
    ("installed", "chip", "chosen", "found"),
    [
        ("libtpu", False, None, "cpu"),
        ("libtpu", False, "", "cpu"),
        ("libtpu", True, None, None),
        ("libtpu", False, "tpu,cpu", "tpu,cpu"),
        ("other", False, None, None),
    ],
)
def test_libtpu_starts_only_where_a_tpu_is(machine, tmp_path, installed, chip, chosen, found):
    """It prints warnings where there is none; what the user chose stays."""
    machine.setenv("JAX_PLATFORMS", chosen) if chosen is not None else machine.delenv("JAX_PLATFORMS")
    machine.setattr(hardware, "find_spec", lambda name: name if name == installed else None)
    if chip:
        (tmp_path / "accel0").touch()
    machine.setattr(hardware, "_TPU_CHIPS", (f"{tmp_path}/accel[0-9]*",))
    hardware.keep_libtpu_from_starting()
    assert os.environ.get("JAX_PLATFORMS") == found


def test_a_run_keeps_its_choices(machine, tmp_path):
    """Results depend on them in the last bits; what the config says goes first, and fewer cores end it."""
    (tmp_path / "config.json").write_text(
        json.dumps({"cpu": {"devices": 2, "pieces": 4, "products": "onednn", "fold": False}})
    )
    for overrides, cores, found in (
        ({}, 8, (2, 4)),
        ({"cpu__pieces": 8}, 8, (2, 8)),
        ({"cpu__devices": 1}, 8, (1, 0)),
        ({}, 1, (1, 0)),
    ):
        machine.setattr(cpu, "num_cores", lambda cores=cores: cores)
        machine.delenv("XLA_FLAGS", raising=False)
        config = smoke_config(**overrides)
        start.choose_devices(config, str(tmp_path))
        assert (config.cpu.devices, config.cpu.pieces) == found
        assert (config.cpu.products, config.cpu.fold) == ("onednn", False)


@pytest.mark.parametrize(
    ("overrides", "devices"),
    [({}, 2), ({"task": "finetune", "classify__mixup": 0.8}, 1), ({"cpu__pieces": 10}, 1)],
)
def test_devices_chosen_for_a_run_can_compute_it(machine, tmp_path, overrides, devices):
    """125 images are whole shares of 250, but no whole pairs to mix, and no ten pieces."""
    machine.setattr(cpu, "num_cores", lambda: 2)
    config = smoke_config(global_batch_size=250, **overrides)
    start.choose_devices(config, str(tmp_path))
    assert config.cpu.devices == devices
    job.check_mesh(config, devices)


def test_more_devices_than_cores(machine, tmp_path):
    """They would wait for each other for ever; a mesh that needs them is refused where meshes are checked."""
    with pytest.raises(ConfigError, match=r"cpu\.devices=9 and this process may use 8 cores"):
        start.choose_devices(smoke_config(cpu__devices=9), str(tmp_path))
    assert start.choose_devices(smoke_config(mesh__data=16), str(tmp_path)) == 0


@pytest.mark.long
@pytest.mark.parametrize("masking", ["random", "grid"])
def test_pieces_and_devices_change_nothing(masking):
    """Two devices in four pieces each with all choices, and the plain step: the same losses to float tolerance."""
    options = {"total_steps": 3, "model__masking": masking, "model__layer_scale_init": 0.1}
    whole, _ = losses(smoke_config(**options, cpu__pieces=1, cpu__fold=False, cpu__products="xla"), 1)
    for products in onednn.BACKENDS if onednn.has_onednn() else ("xla",):
        pieces, _ = losses(smoke_config(**options, cpu__pieces=4, cpu__products=products), 2)
        np.testing.assert_allclose(pieces, whole, rtol=2e-6)


def test_evaluation_in_pieces(monkeypatch):
    """Every example once, whatever the pieces: counts are exact, means to float tolerance."""
    results = []
    for pieces in (1, 4):
        monkeypatch.setattr(cpu, "num_pieces", lambda *args, pieces=pieces: pieces)
        config = smoke_config(task="finetune", data__num_examples=100)
        built = job.build(config, jax.devices()[:2], open_data(config))
        with jax.set_mesh(built.mesh):
            state = built.init_state()
            rows = local_rows(built.batch_sharding, 32)
            batch = built.data.train.examples(np.arange(32))
            batch |= {"index": np.arange(32, dtype=np.int32), "weight": (np.arange(32) < 30).astype(np.float32)}
            metrics = built.eval_step(state.params, to_global(batch, built.batch_sharding, 32, rows))
        results.append(jax.device_get(metrics))
    assert results[0]["loss"].count == results[1]["loss"].count == 30
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize(
    "overrides", [pytest.param({}, marks=pytest.mark.long), {"pretrain__norm_pix_loss": True, "model__scan": True}]
)
def test_training_loss_is_that_of_the_whole_prediction(overrides):
    """Decoding in shuffled order and the removed patches only: the loss and gradient of He et al. all the same."""
    config = smoke_config(**overrides)
    task = make_task(config, 10, PLAIN)
    params = jax.jit(task.init_params, compiler_options=QUICK)(jax.random.key(0))
    images = jax.random.randint(jax.random.key(1), (4, *config.model.image_size, 3), 0, 256, jnp.int32)
    batch = {"image": images.astype(jnp.uint8), "index": jnp.arange(4, dtype=jnp.int32), "weight": jnp.ones(4)}
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(config.seed), batch["index"])

    def short(params):
        return task.loss(params, batch, keys)[0].mean()

    def whole(params):
        metric: Any = task.evaluate(params, batch)["loss"]
        return metric.total / metric.count.astype(jnp.float32)

    a, b = (jax.jit(jax.value_and_grad(f), compiler_options=QUICK)(params) for f in (short, whole))
    np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
    for x, y in zip(jax.tree.leaves(a[1]), jax.tree.leaves(b[1]), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_pieces_take_one_trace(monkeypatch):
    """The shapes of what pieces sum up come from the trace that computes them: a model's takes seconds of a start."""
    traced = []
    forward = autoencoder.MaskedAutoencoder.removed_patches
    monkeypatch.setattr(
        autoencoder.MaskedAutoencoder, "removed_patches", lambda *args, **kw: traced.append(1) or forward(*args, **kw)
    )
    config = smoke_config(accum_steps=2)
    built = job.build(config, jax.devices()[:2], open_data(config))
    traced.clear()
    batch = {"image": jax.ShapeDtypeStruct((config.global_batch_size, *config.model.image_size, 3), jnp.uint8)}
    with jax.set_mesh(built.mesh):
        built.train_step.trace(built.abstract_state, batch)
    assert len(traced) == 1


@pytest.mark.long
def test_one_compilation():
    """An update gives back just what the next one takes: another type somewhere, and it would be compiled again."""
    config = smoke_config(model__layer_scale_init=0.1)
    built = job.build(config, jax.devices()[:2], open_data(config))
    rows = local_rows(built.batch_sharding, config.global_batch_size)
    with jax.set_mesh(built.mesh):
        state = built.init_state()
        batches = built.train_batches(built.data.train, 0, rows)
        for _ in range(2):
            batch = to_global(next(batches), built.batch_sharding, config.global_batch_size, rows)
            state, _ = built.train_step(state, batch)
        batches.close()
    step: Any = built.train_step.program
    assert step._cache_size() == 1


@pytest.mark.parametrize("numbers", [1000, 10**9])
def test_options_are_known_to_this_jaxlib(machine, numbers):
    """XLA refuses a program with an option that it does not know."""
    for options in (cpu.options_to_train(), cpu.options_to_run_once(jaxlib.version.__version__, numbers)):
        assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2


def test_options_of_later_versions_and_of_the_user(machine):
    """What may be gone is not set, nor what the user has set."""
    assert "xla_cpu_use_fusion_emitters" in cpu.options_to_run_once("0.10.9", 1)
    assert "xla_cpu_use_fusion_emitters" not in cpu.options_to_run_once("0.11.0", 1)
    machine.setenv("XLA_FLAGS", "--xla_backend_optimization_level=2")
    assert cpu.options_to_train() == {}
    assert list(cpu.options_to_run_once("0.10.9", 1)) == ["xla_cpu_use_fusion_emitters"]


@pytest.mark.long
def test_compiled_programs_are_kept(child_env, tmp_path):
    """A run beside the first one, of another seed, rate, warm-up and length, compiles nothing anew.

    A place that others may write to is left alone.
    """
    env = child_env()
    del env["JAX_COMPILATION_CACHE_DIR"], env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]
    kept = tmp_path / ".compiled"
    found = []
    other = ("seed=4294967295", "optim.base_lr=0.003", "optim.final_lr=0.001", "optim.warmup_epochs=40.0")
    for name, changes in (("first", ("total_steps=2",)), ("second", (*other, "total_steps=3"))):
        fields = [f"--config.{change}" for change in changes]
        options = ("--config=configs/smoke.py", *ONLY_UPDATES, *fields, f"--workdir={tmp_path / name}")
        code, output = run(env, *options)
        assert code == 0, output
        found.append({path.name for path in kept.glob("*-cache")})
    assert any(name.startswith("jit_train_step") for name in found[0])
    assert found[0] == found[1]
    assert kept.stat().st_mode & 0o777 == 0o700
    shutil.rmtree(kept)
    kept.mkdir()
    kept.chmod(0o777)
    code, output = run(env, *options, "--config.total_steps=4")
    assert code == 0, output
    assert "compiled programs are not kept" in output
    assert not list(kept.iterdir())


def test_activation_bytes_by_hand():
    """The decoder of configs/cifar_small.py: 65 tokens of 64, to q, k and v, and four heads' scores."""
    size = flops.activation_bytes(num_tokens=65, embed_dim=64, num_heads=4, mlp_ratio=2.0)
    assert size == 4 * (65 * (64 + 192) + 4 * 65 * 65)


@pytest.mark.long
def test_benchmark_takes_turns(child_env):
    """Both implementations really run; each figure is there and possible."""
    pytest.importorskip("transformers", reason=NO_PARITY)
    shape = ("--config.model.image_size=(16, 16)", "--config.global_batch_size=16", "--config.data.num_examples=64")
    options = ("--json", "--against=hf", "--repeats=2", "--secs=0.05")
    env = {**child_env(), "TORCHDYNAMO_DISABLE": "1"}  # torch.compile then compiles nothing, which takes it long
    code, output = run(env, "--config=configs/smoke.py", *shape, *options, module="benchmark")
    assert code == 0, output
    result = json.loads(output.strip().splitlines()[-1])
    assert result["ratio"] > 0
    assert 0 < result["mfu"] < 1
    assert 0 <= result["data_wait_share"] < 1
    for name in ("images_per_sec", "hf_eager_images_per_sec", "compile_secs", "peak_memory_mib", "peak_gflops"):
        assert result[name] > 0, name
    assert functools.reduce(min, (result["devices"], result["pieces"])) >= 1


def test_devices_as_many_as_cores_do_not_wait_for_ever(child_env):
    """XLA takes 32 programs for a device; with no more threads than devices, one more would stop the exchanges."""
    program = """
import jax, mae_dist
job = mae_dist.build(mae_dist.get_config("smoke"))
assert job.mesh.size == 2
batch = next(job.batches())
with jax.set_mesh(job.mesh):
    state = job.init_state()
    for _ in range(60):
        state, metrics = job.train_step(state, batch)
print(int(state.step))
"""
    env = {**child_env(devices=2), "NPROC": "2"}  # as on two cores
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=100)
    assert done.stdout == "60\n", done.stderr
