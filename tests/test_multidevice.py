"""The same numbers on any mesh: eight fake CPU devices, real optimisation."""

import jax
import numpy as np
import pytest

from mae_dist.data.from_config import open_data
from mae_dist.model.parameters import path_name
from mae_dist.parallel import shardings
from mae_dist.training import job
from tests.runs import losses, smoke_config


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
        return np.delete(leaf, 1, axis=1) if path_name(path).endswith("attn/qkv/bias") else leaf

    return jax.tree.leaves(jax.tree_util.tree_map_with_path(without_keys, params))


@pytest.mark.parametrize(
    "shape",
    [pytest.param((8, 1, 1), marks=pytest.mark.long), pytest.param((1, 8, 1), marks=pytest.mark.long), (2, 2, 2)],
)
def test_every_mesh_gives_the_losses_of_one_device(one_device, shape):
    """Examples, masks and gradients must not depend on how the work is split."""
    data, fsdp, tensor = shape
    config = smoke_config(global_batch_size=64, mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor)
    values, state = losses(config, 8)
    np.testing.assert_allclose(values, one_device[0], rtol=1e-5)
    for a, b in zip(trained(state.params), trained(one_device[1].params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


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
