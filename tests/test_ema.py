"""The moving average of the parameters: its formula, where it lies, who reads it."""

import functools
import json
from typing import Any

import jax
import numpy as np
import pytest

from mae_dist import config as config_lib
from mae_dist.checkpoint import reader
from mae_dist.data.from_config import open_data
from mae_dist.training import job
from mae_dist.weights import pretrained
from tests.runs import compile_quickly, first_batch, smoke_config
from tests.test_checkpoint import new_state, open_checkpoints, save


@functools.cache
def build(**overrides: Any) -> job.Job:
    """A job on two devices that share the parameters."""
    config = smoke_config(mesh__fsdp=2, model__depth=1, ema_decay=0.6, **overrides)
    return job.build(config, jax.devices()[:2], open_data(config))


def on_host(tree: Any) -> Any:
    return jax.tree.map(np.array, tree)


def test_average_of_parameters():
    """The recurrence in float64, laid out as the parameters; an update that is skipped leaves it as it was."""
    built = build()
    batch = first_batch(built)
    init, update = compile_quickly(built, batch)
    state = init()
    for leaf, param in zip(jax.tree.leaves(state.ema), jax.tree.leaves(state.params), strict=True):
        assert leaf.sharding == param.sharding
        np.testing.assert_array_equal(leaf, param)
    average = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.params)
    start = 8  # where the limit sets in: (1 + 11) / (10 + 11) = 0.57, (1 + 13) / (10 + 13) = 0.609
    state = state.replace(step=jax.device_put(np.int32(start), state.step.sharding))
    with jax.set_mesh(built.mesh):
        for step in range(start, start + 8):
            state, _ = update(state, batch)
            decay = min(0.6, (1 + step) / (10 + step))
            average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * np.asarray(p), average, state.params)
        jax.tree.map(lambda ours, a: np.testing.assert_allclose(ours, a, rtol=1e-5, atol=1e-6), state.ema, average)
        before = on_host(state.ema)
        broken = {**state.params, "decoder": jax.tree.map(lambda p: p * np.float32(np.nan), state.params["decoder"])}
        state, metrics = update(state.replace(params=broken), batch)
    assert int(metrics["skipped_run"]) == 1
    jax.tree.map(np.testing.assert_array_equal, on_host(state.ema), before)


@pytest.mark.long
def test_what_is_handed_on(workdir):
    """Readers of a checkpoint get the averages; of what is frozen there is none, and they get the parameters."""
    built = build(task="probe", init_from="unused")
    state = new_state(built)
    other = jax.tree.map(lambda leaf: leaf + 1, state.ema)
    state = state.replace(ema=other)
    assert set(state.ema) == {"head"}
    expected = on_host({**state.params, **other})
    jax.tree.map(np.testing.assert_array_equal, on_host(state.averaged), expected)
    (workdir / "checkpoints").mkdir(parents=True)
    (workdir / "config.json").write_text(config_lib.to_json(built.config))
    with open_checkpoints(workdir) as checkpoints:
        save(checkpoints, built, state, 3)
        restored = checkpoints.restore(built.abstract_state, built.shardings, built.config, built.fingerprint)
    assert restored is not None
    jax.tree.map(np.testing.assert_array_equal, on_host(restored[0]), on_host(state))
    assert "ema.head.linear.bias" in json.loads((workdir / "checkpoints/3/meta/metadata").read_text())["digests"]
    source = pretrained.open_pretrained(workdir)
    jax.tree.map(np.testing.assert_array_equal, source.load_whole(), expected)
    _, encoder = reader.load_params(
        workdir,
        {"encoder": built.abstract_state.params["encoder"]},
        {"encoder": built.shardings.params["encoder"]},
    )
    jax.tree.map(np.testing.assert_array_equal, on_host(encoder), {"encoder": expected["encoder"]})


@pytest.mark.long
def test_starts_from_the_weights_it_is_given(workdir):
    """Not from random ones; and in arrays of its own, for an update overwrites both."""
    source = build()
    reader.save_params(workdir, source.config, new_state(source).params, "a test")
    built = build(task="finetune", init_from=str(workdir), seed=5)
    state = built.init_state()
    jax.tree.map(np.testing.assert_array_equal, on_host(state.ema), on_host(state.params))
    for average, param in zip(jax.tree.leaves(state.ema), jax.tree.leaves(state.params), strict=True):
        shards = zip(average.addressable_shards, param.addressable_shards, strict=True)
        assert all(a.data.unsafe_buffer_pointer() != p.data.unsafe_buffer_pointer() for a, p in shards)
