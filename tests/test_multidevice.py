"""The same numbers on any mesh: eight fake CPU devices, real optimisation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mae_dist.data.from_config import open_data
from mae_dist.model.parameters import path_name
from mae_dist.parallel import scatter, shardings
from mae_dist.parallel.mesh import make_mesh
from mae_dist.parallel.shardings import on_each_device
from mae_dist.training import job
from mae_dist.training.gradient import make_exchange
from tests.runs import losses, smoke_config


@functools.cache
def on_mesh(shape, **changes):
    """20 updates on a mesh of eight devices."""
    data, fsdp, tensor = shape
    mesh = {"mesh__data": data, "mesh__fsdp": fsdp, "mesh__tensor": tensor}
    return losses(smoke_config(global_batch_size=64, **mesh, **changes), 8)


@pytest.fixture(scope="module")
def one_device():
    """20 updates on one device."""
    return losses(smoke_config(global_batch_size=64), 1)


def trained(params):
    """The parameters but the biases of the keys.

    Softmax takes no notice of those: their gradient is rounding noise, which Adam makes as large as any other.
    """

    def without_keys(path, leaf):
        leaf = np.asarray(leaf)
        for end, keys in (("attn/qkv/bias", 1), ("attn/kv/bias", 0)):
            if path_name(path).endswith(end):
                return np.delete(leaf, keys, axis=1)
        return leaf

    return jax.tree.leaves(jax.tree_util.tree_map_with_path(without_keys, params))


@pytest.mark.parametrize(
    "shape",
    [pytest.param((8, 1, 1), marks=pytest.mark.long), pytest.param((1, 8, 1), marks=pytest.mark.long), (2, 2, 2)],
)
def test_every_mesh_gives_the_losses_of_one_device(one_device, shape):
    """Examples, masks and gradients must not depend on how the work is split."""
    values, state = on_mesh(shape)
    np.testing.assert_allclose(values, one_device[0], rtol=1e-5)
    for a, b in zip(trained(state.params), trained(one_device[1].params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


LARS = {"task": "finetune", "optim__name": "lars", "optim__layer_decay": 0.75}


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        pytest.param((8, 1, 1), {"ema_decay": 0.9, "accum_steps": 2}, marks=pytest.mark.long),
        pytest.param((8, 1, 1), LARS, marks=pytest.mark.long),
        ((2, 2, 2), {}),
        pytest.param((4, 1, 2), {"accum_steps": 2}, marks=pytest.mark.long),
    ],
)
def test_a_sharded_state_is_updated_alike(shape, changes):
    """Each device updates its part of parameters, moments and averages: to the values that all would compute."""
    whole, sharded = on_mesh(shape, **changes), on_mesh(shape, optim__shard_state=True, **changes)
    np.testing.assert_allclose(sharded[0], whole[0], rtol=1e-6)
    for part in ("params", "ema"):
        if getattr(whole[1], part) is not None:
            for a, b in zip(*(trained(getattr(state, part)) for _, state in (sharded, whole)), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    kernel = sharded[1].params["encoder"]["stack"]["blocks"]["mlp"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size, "on (2, 2, 2) every axis splits it"


@pytest.mark.parametrize(("dtype", "expected"), [("float32", 256 + 7 / 8), ("bfloat16", 256)])
def test_gradients_are_summed_in_the_type_of_the_exchange(dtype, expected):
    """A part of each sum stays on its device; bfloat16 has 8 bits, so that 256 + 1/8 is 256."""
    mesh = make_mesh({"data": 8, "fsdp": 1, "tensor": 1}, jax.devices())
    split = NamedSharding(mesh, PartitionSpec(None, "data"))
    rows = jnp.where(jnp.arange(8)[:, None, None] == 0, 256.0, 1 / 8) * jnp.ones((1, 3, 16))
    total = on_each_device(
        lambda x: ({"kernel": x[0]}, {}),
        mesh,
        num_whole=0,
        combine=make_exchange({"kernel": split}, dtype),
        combined=({"kernel": split.spec}, PartitionSpec()),
    )
    kernel = jax.jit(lambda x: total(x)[0]["kernel"])(rows)
    assert kernel.dtype == jnp.float32
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 2)}
    np.testing.assert_array_equal(kernel, np.full((3, 16), expected))


@pytest.mark.parametrize("fuse_blocks", [False, True])
def test_a_cross_decoder_on_every_mesh(fuse_blocks):
    """Its weights are split like others, and which patches are predicted depends on the example alone."""
    options: dict[str, Any] = {
        "model__decoder": "cross",
        "model__predict_ratio": 0.34,
        "model__fuse_blocks": fuse_blocks,
        "model__decoder_num_heads": 4,
        "model__decoder_depth": 2,
        "global_batch_size": 64,
        "total_steps": 6,
    }
    expected, expected_state = losses(smoke_config(**options), 1)
    for data, fsdp, tensor in ((2, 2, 2), (1, 2, 4)):
        config = smoke_config(**options, mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor)
        values, state = losses(config, 8)
        np.testing.assert_allclose(values, expected, rtol=1e-5)
        for a, b in zip(trained(state.params), trained(expected_state.params), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
        blocks = state.params["decoder"]["stack"]["blocks"]["attn"]
        assert blocks["kv"]["kernel"].addressable_shards[0].data.shape == (2, 16, 2, 4 // tensor, 8)


@pytest.mark.parametrize("slices", [2, 4])
def test_a_sum_scattered_within_slices_first(monkeypatch, slices):
    """Each device has its own part, not that of another, for all that the slices come last."""
    mesh = make_mesh({"data": 8, "fsdp": 1, "tensor": 1}, jax.devices())
    split = NamedSharding(mesh, PartitionSpec(None, "data"))
    rows = jnp.arange(8 * 3 * 16, dtype=jnp.float32).reshape(8, 3, 16)
    monkeypatch.setattr(scatter, "num_slices", lambda devices: slices)
    total = on_each_device(
        lambda x: x[0], mesh, 0, combine=lambda x: scatter.sum_into_shards(x, split), combined=split.spec
    )
    np.testing.assert_array_equal(jax.jit(total)(rows), rows.sum(axis=0))


def test_an_exchange_without_effect_is_said(caplog):
    """The compiler chooses the type on meshes that are not data-parallel."""
    for fsdp in (1, 2):
        config = smoke_config(optim__grad_exchange="bfloat16", mesh__data=-1, mesh__fsdp=fsdp)
        job.build(config, jax.devices(), open_data(config))
        found = [
            r.getMessage() for r in caplog.records if "optim.grad_exchange=bfloat16 has no effect" in r.getMessage()
        ]
        assert len(found) == fsdp - 1


def test_loss_falls(one_device):
    """The comparison above would hold for a model that does not learn, too."""
    assert one_device[0][-1] < 0.8 * one_device[0][0]


@pytest.mark.long
def test_accumulation_equals_one_large_batch():
    """4 x 64 is 1 x 256, masks and stochastic depth included."""
    options = {"global_batch_size": 256, "total_steps": 6, "model__drop_path": 0.2, "model__dropout": 0.1}
    whole, _ = losses(smoke_config(**options), 1)
    parts, _ = losses(smoke_config(**options, accum_steps=4, mesh__data=2, mesh__fsdp=2), 4)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_state_is_created_in_its_shards():
    """No parameter or moment ever lies whole on a device that should hold a part of it."""
    config = smoke_config(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
    built = job.build(config, jax.devices(), open_data(config))
    before = sum(array.nbytes for array in jax.live_arrays())
    state = built.init_state()
    new = sum(array.nbytes for array in jax.live_arrays()) - before
    assert new == sum(array.nbytes for array in jax.tree.leaves(state)), "something else was left beside the state"
    kernel = state.params["encoder"]["stack"]["blocks"]["mlp"]["fc1"]["kernel"]  # (2, 32, 64)
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 16, 32)}
    held = sum(shard.data.nbytes for array in jax.tree.leaves(state.params) for shard in array.addressable_shards[:1])
    assert held == shardings.bytes_per_device(built.abstract_state.params, built.shardings.params)
    assert held < 0.6 * sum(array.nbytes for array in jax.tree.leaves(state.params))


def test_batch_that_does_not_divide_names_both_numbers():
    """Refused before any device work."""
    config = smoke_config(global_batch_size=60, mesh__data=8)
    with pytest.raises(ValueError, match=r"global_batch_size=60.*= 8; nearest that does: 64"):
        job.build(config, jax.devices(), open_data(config))


def test_heads_that_do_not_divide_name_both_numbers():
    """As above, for the tensor axis."""
    config = smoke_config(mesh__data=1, mesh__tensor=8)
    with pytest.raises(ValueError, match=r"model.num_heads=4 does not divide by mesh.tensor=8"):
        job.build(config, jax.devices(), open_data(config))
