"""Runs that differ in seed, rate, warm-up and length share their programs, and differ in what these compute."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_dist.data.from_config import open_data
from mae_dist.training import job
from tests.runs import compile_quickly, first_batch, smoke_config

OTHER = {"seed": 2**32 - 1, "optim__base_lr": 0.01, "optim__final_lr": 1e-3, "optim__warmup_epochs": 50.0}
OTHER |= {"total_steps": 7}


def programs(**overrides: Any) -> dict[str, str]:
    """The text of all that a pretraining compiles, by name."""
    config = smoke_config(**overrides)
    built = job.build(config, jax.devices()[:2], open_data(config))
    size, sharding = built.eval_batch_size, built.batch_sharding
    columns = {"label": jnp.int32, "index": jnp.int32, "weight": jnp.float32, "seed": jnp.uint32}
    batch = built.abstract_batch | {
        name: jax.ShapeDtypeStruct((size,), dtype, sharding=sharding) for name, dtype in columns.items()
    }
    params = built.abstract_state.params
    with jax.set_mesh(built.mesh):
        lowered = {
            "init": jax.jit(built.init, out_shardings=built.shardings).lower(np.uint32(config.seed)),
            "train_step": built.train_step.lower(built.abstract_state, built.abstract_batch),
            "eval_step": built.eval_step.lower(params, batch),
            "reconstruct_step": built.reconstruct_step.lower(params, batch),
        }
    return {name: program.as_text() for name, program in lowered.items()}


def test_one_program_for_all_seeds_rates_and_lengths():
    first = programs()
    assert programs(**OTHER) == first
    changed = programs(optim__weight_decay=0.3)
    assert {name for name in first if changed[name] != first[name]} == {"train_step"}


@pytest.mark.parametrize("seed", [0, 5, 2**31 + 5, 2**32 - 1])
def test_a_seed_is_the_same_as_an_argument(seed):
    """As a constant it was a Python number, of which JAX makes its own."""
    key = jax.jit(jax.random.key)(np.uint32(seed))
    assert jnp.array_equal(jax.random.key_data(key), jax.random.key_data(jax.random.key(seed)))


def test_hyperparams_decide():
    """One executable, called with the scalars of two runs: other masks, so another loss."""
    jobs = [
        job.build(config, jax.devices()[:1], open_data(config)) for config in (smoke_config(), smoke_config(**OTHER))
    ]
    batch = first_batch(jobs[0])
    init, update = compile_quickly(jobs[0], batch)
    found = []
    with jax.set_mesh(jobs[0].mesh):
        for built in jobs:
            _, metrics = update.program(init(), batch, built.train_step.hyperparams)
            found.append(jax.device_get(metrics))
        for name in ("loss", "lr"):
            again = jax.device_get(update(init(), batch)[1])
            assert again[name] == found[0][name]
    assert found[0]["loss"] != found[1]["loss"], "the same masks of the same weights"
