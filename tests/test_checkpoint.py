"""Checkpoints: any mesh, retention, the config stored with them, encoders for probe and fine-tuning, faults."""

import functools
import json
import re
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_dist.checkpoint import reader
from mae_dist.checkpoint.manager import Checkpoints
from mae_dist.data.from_config import open_data
from mae_dist.errors import StorageFault
from mae_dist.training import job
from tests.runs import smoke_config

KEEP = {"every_steps": 1, "every_minutes": 0.0, "keep_latest": 2, "keep_every_steps": 0, "keep_best": "", "retries": 0}


@functools.cache
def build(shape=(1, 1, 1), **overrides):
    """A job on smoke.py with a mesh of this shape; it holds no state, and compiles once for all tests."""
    data, fsdp, tensor = shape
    config = smoke_config(mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor, **overrides)
    return job.build(config, jax.devices()[: data * fsdp * tensor], open_data(config))


def new_state(built):
    """A state at step 0 in its shards, of random numbers: the job's own is traced and compiled for seconds."""
    rng = np.random.default_rng(0)

    def fill(leaf, sharding):
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        values = rng.random(leaf.shape) if is_float else np.zeros(leaf.shape)
        return jax.device_put(values.astype(leaf.dtype), sharding)

    return jax.tree.map(fill, built.abstract_state, built.shardings)


def open_checkpoints(workdir, **options):
    """Checkpoints that save at every call by default."""
    return Checkpoints(workdir, **{**KEEP, **options}, log_every_steps=1, total_steps=1000)


def save(checkpoints, built, state, step, metrics=None):
    """Saves if that is due and waits, so that nothing is skipped for a save in progress."""
    if checkpoints.is_due(step, metrics or {}):
        checkpoints.save(step, state, built.meta, metrics or {})
    checkpoints.wait()


def restore(checkpoints, built):
    """The newest good state for the mesh of `built`."""
    restored = checkpoints.restore(built.abstract_state, built.shardings, built.config, built.fingerprint)
    assert restored is not None
    state, step, _ = restored
    assert step == checkpoints.latest_step()
    return state


def steps(workdir):
    """The saved steps."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_restores_onto_any_mesh(workdir):
    """(2,2,2) -> (1,1,1) -> (4,1,2): every array equal and laid out as the new mesh says."""
    first = build((2, 2, 2))
    state = new_state(first)
    wanted = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    with open_checkpoints(workdir) as checkpoints:
        save(checkpoints, first, state, 1)
    for step, shape in enumerate([(1, 1, 1), (4, 1, 2)], start=2):
        built = build(shape)
        with open_checkpoints(workdir) as checkpoints:
            state = restore(checkpoints, built)
            shardings = jax.tree.leaves(built.shardings)
            for leaf, value, sharding in zip(jax.tree.leaves(state), wanted, shardings, strict=True):
                np.testing.assert_array_equal(np.asarray(leaf), value)
                assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
            save(checkpoints, built, state, step)


@pytest.mark.parametrize("replicas", [pytest.param(1, marks=pytest.mark.long), 2])
def test_saved_values_are_those_of_the_step(workdir, replicas):
    """The next update overwrites the donated buffers while the save goes on in the background."""
    built = build((replicas, 1, 1))
    batch = {"image": jnp.zeros((32, 16, 16, 3), np.uint8), "label": jnp.zeros(32, np.int32)}
    state = new_state(built)
    with open_checkpoints(workdir) as checkpoints:
        wanted = jax.tree.map(np.array, state)
        checkpoints.save(1, state, built.meta, {})
        for _ in range(5):
            state, _ = built.train_step(state, batch)
        checkpoints.wait()
        for a, b in zip(jax.tree.leaves(restore(checkpoints, built)), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(np.asarray(a), b)


@pytest.mark.parametrize(("metric", "best"), [("val_loss", 2), ("val_knn_top1", 1)])
def test_retention(workdir, metric, best):
    """The latest two, every third, and the best: by a loss the lowest, by an accuracy the highest."""
    built = build()
    state = new_state(built)
    values = {1: 5.0, 2: 1.0, 3: 3.0, 4: 2.0, 5: 4.0, 6: 4.0, 7: 4.0, 8: 4.0}
    with open_checkpoints(workdir, keep_every_steps=3, keep_best=metric) as checkpoints:
        for step, value in values.items():
            save(checkpoints, built, state, step, {metric: value})
    assert steps(workdir) == [best, 3, 6, 7, 8]


def test_first_save_compiles_one_small_program(workdir, caplog):
    """Digests of all arrays share it, and none is sliced among replicas of one process: seconds of a first save."""
    built = build((2, 1, 1), model__embed_dim=48)  # shapes that no other test has compiled for
    state = new_state(built)
    with open_checkpoints(workdir) as checkpoints, jax.log_compiles():
        checkpoints.save(1, state, built.meta, {}, wait=True)
    assert len([line for line in caplog.messages if line.startswith("Finished XLA compilation")]) <= 1, caplog.text


def test_steps_between_are_not_saved(workdir):
    """Called after every update, saved at the interval and at the last."""
    built = build()
    state = new_state(built)
    with Checkpoints(workdir, **{**KEEP, "every_steps": 4}, log_every_steps=1, total_steps=10) as checkpoints:
        for step in range(1, 11):
            save(checkpoints, built, state, step)
    assert steps(workdir) == [8, 10]


def test_the_best_stays_after_a_restart(workdir):
    """The metric must be stored with the checkpoint: the next process compares with it; NaN is never best."""
    built = build()
    state = new_state(built)
    options = {"keep_best": "val_loss", "every_steps": 0, "keep_latest": 1}
    for values in ({1: 3.0, 2: 1.0, 3: float("nan")}, {4: 2.0, 5: 5.0}):
        with open_checkpoints(workdir, **options) as checkpoints:
            for step, loss in values.items():
                save(checkpoints, built, state, step, {"val_loss": loss})
    assert steps(workdir) == [2, 5]


@pytest.mark.parametrize("metrics", [("val_loss", "val_knn_top1"), ("val_knn_top1", "val_loss")])
def test_another_metric_from_now_on(workdir, metrics):
    """What was saved for the metric before has no value of the new one, and gives way to the first that has."""
    built = build()
    state = new_state(built)
    best = {"val_loss": 0.1, "val_knn_top1": 0.9}
    for metric, first in zip(metrics, (1, 4), strict=True):
        with open_checkpoints(workdir, keep_best=metric, every_steps=0, keep_latest=1) as checkpoints:
            for step, value in enumerate((0.5, best[metric], 0.5), start=first):
                save(checkpoints, built, state, step, {metric: value})
        assert steps(workdir) == [first + 1, first + 2]


def test_by_minutes_alone(workdir):
    """Nothing at first; one as soon as the start, then the last save, is long enough ago."""
    built = build()
    state = new_state(built)
    # Two seconds: what is saved in between takes well under that, also on a busy machine.
    with open_checkpoints(workdir, every_steps=0, every_minutes=2 / 60) as checkpoints:
        save(checkpoints, built, state, 1)
        assert steps(workdir) == []
        time.sleep(2.1)
        save(checkpoints, built, state, 2)
        save(checkpoints, built, state, 3)
        assert steps(workdir) == [2]
        time.sleep(2.2)
        save(checkpoints, built, state, 4)
    assert steps(workdir) == [2, 4]


def test_a_field_added_since_counts_as_its_default(workdir):
    """A checkpoint of an older version continues."""
    built = build()
    old = json.loads(built.meta["config"])
    del old["optim"]["eps"]
    with open_checkpoints(workdir) as checkpoints:
        checkpoints.save(1, new_state(built), {**built.meta, "config": json.dumps(old)}, {})
        checkpoints.wait()
        assert int(restore(checkpoints, built).step) == 0


def test_other_config_or_data_is_refused(workdir):
    """Every field that differs is named with both values; the data set too."""
    built = build()
    with open_checkpoints(workdir) as checkpoints:
        save(checkpoints, built, new_state(built), 1)
        other = build(model__embed_dim=64, seed=7, data__num_examples=640)
        with pytest.raises(StorageFault) as error:
            restore(checkpoints, other)
    text = str(error.value)
    for expected in ("model.embed_dim: 32 -> 64", "seed: 0 -> 7", "training data (fingerprint)", "--workdir"):
        assert expected in text


def test_free_fields_may_change(workdir):
    """How a run is carried out is no part of what it computes."""
    built = build()
    with open_checkpoints(workdir) as checkpoints:
        save(checkpoints, built, new_state(built), 1)
        other = build((2, 1, 1), accum_steps=2, log_every_steps=3, model__scan=True, model__remat="blocks")
        assert int(restore(checkpoints, other).step) == 0


@pytest.mark.parametrize("task", ["pretrain", "probe", "finetune"])
def test_weights_of_a_pretraining(workdir, task):
    """Exactly the encoder, and by a pretraining the decoder, is taken over, onto another mesh; the rest is new."""
    source = build((2, 2, 2))
    state = new_state(source)
    (workdir / "checkpoints").mkdir(parents=True)
    (workdir / "config.json").write_text(source.meta["config"])
    with open_checkpoints(workdir) as checkpoints:
        save(checkpoints, source, state, 3)
    # Another seed: the encoder could not be equal by chance.
    built = build((4, 1, 2), task=task, init_from=str(workdir), seed=5)
    loaded = built.init_state()
    for group in ("encoder", "decoder") if task == "pretrain" else ("encoder",):
        a, b = (jax.tree.leaves(params[group]) for params in (loaded.params, state.params))
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    assert set(loaded.params) == {"encoder", "decoder" if task == "pretrain" else "head"}
    assert int(loaded.step) == 0


def test_encoder_without_its_norm_is_refused(workdir):
    """A fine-tuned encoder with the norm in its head, where one is needed that has its own."""
    source = build(task="finetune", classify__norm_after_pool=True)
    reader.save_params(workdir, source.config, new_state(source).params, "a test")
    built = build(task="finetune", init_from=str(workdir))
    with pytest.raises(StorageFault, match=r"has no encoder/norm, .*norm_after_pool"):
        built.init_state()


def test_converted_weights_are_not_continued(workdir):
    """They have no optimizer state: a run from them is a new one."""
    built = build()
    reader.save_params(workdir, built.config, new_state(built).params, "a test")
    with open_checkpoints(workdir) as checkpoints, pytest.raises(StorageFault, match=r"converted weights \(a test\)"):
        restore(checkpoints, built)


def test_corrupted_weights_are_found(workdir):
    """Converted ones too: a wrong byte by their manifest, wrong values by their digests, and the cure is named."""
    built = build()
    params = {"encoder": {"kernel": np.arange(3.0, dtype=np.float32)}}
    reader.save_params(workdir, built.config, params, "a test")
    assert reader.condition(workdir, 0) == []
    meta = workdir / "checkpoints" / "0" / "meta" / "metadata"
    meta.write_text(re.sub(r'("params\.encoder\.kernel": ")\w{16}', r"\g<1>0123456789abcdef", meta.read_text()))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    sharding = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), params)
    assert reader.condition(workdir, 0) == ["meta/metadata is corrupted"]
    with pytest.raises(StorageFault, match="holds no good checkpoint"):
        reader.load_params(workdir, abstract, sharding)
    shutil.rmtree(workdir / "seals")
    with pytest.raises(StorageFault, match=r"params\.encoder\.kernel is corrupted\. Delete .* convert a test again"):
        reader.load_params(workdir, abstract, sharding)


def test_encoder_that_does_not_fit_is_refused(workdir):
    """Field by field, before anything is read."""
    source = build()
    reader.save_params(workdir, source.config, new_state(source).params, "a test")
    built = build(task="probe", init_from=str(workdir), model__embed_dim=64, model__depth=3)
    with pytest.raises(StorageFault, match=r"model.embed_dim: 32 -> 64\n.*model.depth: 2 -> 3"):
        built.init_state()


def test_faults_advise_to_verify_the_workdir(workdir):
    """Whatever is unreadable or cannot be written: a file, or a checkpoint."""
    built = build()
    reader.save_params(workdir, built.config, {"encoder": {"kernel": np.zeros(3)}}, "a test")
    shutil.rmtree(workdir / "seals", ignore_errors=True)  # a checkpoint that an older version wrote has none
    (workdir / "checkpoints" / "0" / "state" / "_METADATA").write_text("{")
    with pytest.raises(StorageFault, match=rf"checkpoint {workdir}/checkpoints/0 cannot(.|\n)*verify {workdir}\)"):
        reader.load_params(workdir, built.abstract_state.params, built.shardings.params)
    (workdir / "config.json").write_text("{")
    with pytest.raises(StorageFault, match=rf"^{workdir}/config.json is corrupted: .*continue the run"):
        reader.read_config(workdir)


def test_missing_workdir_and_missing_checkpoint_are_named(workdir):
    """What init_from or --workdir should have been."""
    with pytest.raises(StorageFault, match=r"no config\.json"):
        reader.read_config(workdir)
    (workdir / "checkpoints").mkdir(parents=True)
    built = build()
    with pytest.raises(StorageFault, match="holds no checkpoint"):
        reader.load_params(workdir, built.abstract_state.params, built.shardings.params)
