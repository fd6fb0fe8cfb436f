"""The rules table, the mesh, and where the bytes of a state really lie."""

import dataclasses
import functools
import importlib
import math
import pkgutil
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

import configs
from configs import default, smoke
from mae_dist.errors import ConfigError
from mae_dist.model import build as model_build
from mae_dist.model import layers
from mae_dist.model.hooks import PLAIN
from mae_dist.model.parameters import BLOCK, EMBEDDING, HEAD, PARAMETERS, parameter_rows, path_name
from mae_dist.optim.optimizer import make_optimizer
from mae_dist.optim.train_state import TrainState, begin, split_frozen, state_shardings
from mae_dist.parallel.mesh import AXES, make_mesh, mesh_devices, mesh_shape, num_slices
from mae_dist.parallel.overview import overview
from mae_dist.parallel.rules import to_spec
from mae_dist.parallel.shardings import (
    batch_sharding,
    bytes_per_device,
    make_constrain,
    param_shardings,
    replicated,
    split_state,
    state_dimension,
)
from mae_dist.tasks.make import make_task
from tests import QUICK

CONFIGS = sorted(
    module.name
    for module in pkgutil.iter_modules(configs.__path__)
    if hasattr(importlib.import_module(f"configs.{module.name}"), "get_config")
)
# What no config of configs/ uses and a user may: on top of the default.
OPTIONS: dict[str, dict[str, Any]] = {
    "learned positions, LayerScale": {"model.pos_embed": "learned", "model.layer_scale_init": 0.1},
    "constants": {"model.cls_token": "none", "model.mask_token": "zero", "model.qkv_bias": False},
    "cross decoder": {"model.decoder": "cross", "model.fuse_blocks": True},
    "probe, mlp": {"task": "probe", "classify.head": "mlp"},
    "finetune, linear": {"task": "finetune", "classify.head": "linear"},
    "finetune, mlp": {"task": "finetune", "classify.head": "mlp"},
}


def abstract_params(config: ConfigDict) -> Any:
    return model_build.abstract_params(config, 10)


@functools.cache
def every_model() -> dict[str, Any]:
    """The parameter shapes of every config and option."""
    all_configs = {name: importlib.import_module(f"configs.{name}").get_config() for name in CONFIGS}
    for name, changes in OPTIONS.items():
        all_configs[name] = default.get_config()
        all_configs[name].update_from_flattened_dict(changes)
    # Configs that differ in their training only have the same parameters.
    distinct = {
        (config.task != "pretrain", config.model.to_json(), config.classify.to_json()): name
        for name, config in all_configs.items()
    }
    return {name: abstract_params(all_configs[name]) for name in distinct.values()}


def mesh_of(data: int, fsdp: int, tensor: int) -> Mesh:
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    return make_mesh(sizes, jax.devices()[: data * fsdp * tensor])


def test_every_parameter_matches_one_row_and_every_row_a_parameter():
    """A parameter without a row would lie whole on every device; a row without one is a typo."""
    used = set()
    for params in every_model().values():
        rows = parameter_rows(params)  # raises unless each has one
        for (path, leaf), row in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(rows), strict=True):
            name = path_name(path)
            assert row.path == name
            used.add(name)
            *above, last = name.split("/")
            # Biases, norms, LayerScale and statistics do not decay; counting axes would decay stacked ones.
            assert row.decays == (last in ("kernel", "embedding", "cls_token", "mask_token")), name
            assert row.is_stacked == ("blocks" in above), name
            heads = {"qkv/bias": 2, "attn/kv/bias": 2, "attn/q/bias": 1}
            beyond = sum(count for end, count in heads.items() if name.endswith(end))
            assert row.decays or len(leaf.shape) == 1 + row.is_stacked + beyond, name
            begins = re.match(r"encoder/(stack/)?(patch_embed|cls_token|positions)?", name)
            place = HEAD if not begins else BLOCK if begins[1] else EMBEDDING if begins[2] else HEAD
            assert row.layer == place, name
    assert used == set(PARAMETERS)


def test_logical_axes_all_have_a_mesh_axis_or_none():
    """And `to_spec` has no colliding axes in any row."""
    for path, row in PARAMETERS.items():
        spec = to_spec(row.axes, path)
        assert len(spec) <= len(row.axes)


def test_no_row_and_wrong_rank_are_named():
    """These are met when a layer is added: the message must say which."""
    kernel = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    with pytest.raises(ValueError, match=r"parameter encoder/adapter/kernel \(2, 3\) has no row in .*add one"):
        parameter_rows({"encoder": {"adapter": {"kernel": kernel}}})
    with pytest.raises(ValueError, match=r"head/linear/bias has shape \(2, 3\) and its row 1 axes"):
        parameter_rows({"head": {"linear": {"bias": kernel}}})


def test_colliding_mesh_axes_name_both():
    """An array cannot be split twice over the same devices."""
    with pytest.raises(ValueError, match=r"some/kernel: logical axes 'heads' and 'mlp' both map to mesh axis 'tensor'"):
        to_spec(("heads", "mlp"), "some/kernel")
    with pytest.raises(ValueError, match=r"logical axes 'batch' and 'embed' both map to mesh axis 'fsdp'"):
        to_spec(("batch", "embed"), "x")


@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        (("batch", "patches", None), PartitionSpec(("data", "fsdp"))),
        (("layers", "embed", None, "heads", None), PartitionSpec(None, "fsdp", None, "tensor")),
        ((None, None), PartitionSpec()),
    ],
)
def test_to_spec(axes, spec):
    """Trailing whole axes are left off, so that equal layouts compare equal."""
    assert to_spec(axes, "x") == spec


@pytest.mark.parametrize(
    ("sizes", "devices", "shape"),
    [
        ((-1, 1, 1), 8, (8, 1, 1)),
        ((-1, 2, 2), 8, (2, 2, 2)),
        ((1, -1, 4), 8, (1, 2, 4)),
        ((2, 2, -1), 4, (2, 2, 1)),
        ((1, 1, 1), 1, (1, 1, 1)),
    ],
)
def test_mesh_shape(sizes, devices, shape):
    """-1 takes what is left."""
    assert mesh_shape(dict(zip(AXES, sizes, strict=True)), devices) == shape


@pytest.mark.parametrize(
    ("sizes", "devices", "message"),
    [
        ((-1, -1, 1), 8, r"mesh.data=-1, mesh.fsdp=-1, mesh.tensor=1: .*at most one may be -1"),
        ((0, 1, 1), 8, "sizes are positive"),
        ((-2, 1, 1), 8, "sizes are positive"),
        ((-1, 3, 1), 8, r"the fixed sizes multiply to 3, which does not divide 8 devices"),
        ((-1, 16, 1), 8, "multiply to 16, which does not divide 8 devices"),
        ((2, 2, 1), 8, r"needs 4 devices and there are 8; .*make the product 8"),
    ],
)
def test_mesh_that_cannot_be_made(sizes, devices, message):
    """Both numbers and the cure."""
    with pytest.raises(ConfigError, match=message):
        mesh_shape(dict(zip(AXES, sizes, strict=True)), devices)


@given(
    sizes=st.tuples(*[st.integers(-2, 4)] * 3),
    devices=st.integers(1, 32),
)
def test_mesh_shape_uses_every_device_or_fails(sizes, devices):
    """Devices left over would idle unnoticed."""
    try:
        shape = mesh_shape(dict(zip(AXES, sizes, strict=True)), devices)
    except ConfigError:
        return
    assert math.prod(shape) == devices
    assert all(asked in (-1, got) for asked, got in zip(sizes, shape, strict=True))


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a TPU of a slice as placing it needs."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0
    process_index: int = 0


def chips_of(slices: int, side: int, **other: Any) -> list[Chip]:
    each = [(i, j, 0) for j in range(side) for i in range(side)]
    return [Chip(s * 1000 + i, s, at, **other) for s in range(slices) for i, at in enumerate(each)]


@given(slices=st.integers(1, 4), fsdp=st.sampled_from([1, 2, 4, 8]), tensor=st.sampled_from([1, 2, 4]))
def test_data_spans_slices(slices, fsdp, tensor):
    """Every group along fsdp and tensor lies in one slice; where it cannot, the error names the cure."""
    devices = chips_of(slices, 4)
    sizes = {"data": -1, "fsdp": fsdp, "tensor": tensor}
    if fsdp * tensor > 16:
        if slices * 16 % (fsdp * tensor) == 0:
            with pytest.raises(ConfigError, match=rf"not a multiple of the {slices} slices.*a divisor of 16"):
                mesh_devices(sizes, devices)
        return
    placed = mesh_devices(sizes, devices)
    assert placed.shape == (slices * 16 // (fsdp * tensor), fsdp, tensor)
    assert sorted(device.id for device in placed.flat) == sorted(device.id for device in devices)
    of_row = [{device.slice_index for device in row.flat} for row in placed]
    assert all(len(indices) == 1 for indices in of_row)
    assert [indices.pop() for indices in of_row] == [i for i in range(slices) for _ in range(len(placed) // slices)]


def test_only_tpus_have_slices():
    """JAX numbers the hosts of GPUs as slices, and parameters may be split over those."""
    assert num_slices(chips_of(2, 2)) == 2
    assert num_slices(chips_of(2, 2, platform="gpu")) == 1
    assert num_slices(jax.devices()) == 1


def test_dimension_that_does_not_divide():
    """jit would fail later, with the name of no field."""
    config = smoke.get_config()
    config.model.num_heads = 1
    with pytest.raises(ConfigError) as error:
        param_shardings(mesh_of(1, 1, 2), abstract_params(config))
    message = str(error.value)
    assert "encoder/stack/blocks/attn/out/kernel (2, 1, 32, 32)" in message
    assert "'heads' dimension 1 does not divide by mesh.tensor=2" in message


def make_state(mesh: Mesh, task_name: str, *, shard_state: bool = False) -> tuple[Any, Any, Any]:
    """(init, abstract state, shardings) of the smoke model."""
    config = smoke.get_config()
    config.task = task_name
    task = make_task(config, 10, PLAIN)
    rows = parameter_rows(task.abstract_params)
    options = config.optim.to_dict()
    for name in ("schedule", "base_lr", "final_lr", "warmup_epochs", "shard_state", "grad_exchange"):
        del options[name]
    trainable, _ = split_frozen(rows, task.frozen)
    tx = make_optimizer(trainable, **options)

    def init() -> TrainState:
        return begin(task.init_params(jax.random.key(0)), tx, task.frozen, has_ema=False)

    abstract = jax.eval_shape(init)
    return init, abstract, state_shardings(mesh, abstract, tx, task.frozen, shard_state)


@pytest.mark.parametrize("shard_state", [False, True])
@pytest.mark.parametrize("task", ["pretrain", "probe", "finetune"])
def test_moments_lie_like_their_parameters(task, shard_state):
    """Adam's moments are two thirds of a state: left whole, they would undo what fsdp saves."""
    _, abstract, shardings = make_state(mesh_of(2, 2, 2), task, shard_state=shard_state)
    by_name = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shardings.params)}
    seen: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shardings.opt_state):
        name = path_name(path)
        moment = re.search(r"/(mu|nu)/(.*)", name)
        if moment is None:
            assert leaf.spec == PartitionSpec(), name
        else:
            assert leaf == by_name[moment[2]], name
            seen[moment[2]] = seen.get(moment[2], 0) + 1
    trainable = {name for name in by_name if not (task == "probe" and name.startswith("encoder/"))}
    assert seen == dict.fromkeys(trainable, 2)
    assert jax.tree.structure(abstract) == jax.tree.structure(shardings)


def test_state_is_created_in_its_shards():
    """Each device holds exactly what the overview says, and no device ever the whole of a split array."""
    mesh = mesh_of(2, 2, 2)
    init, abstract, shardings = make_state(mesh, "pretrain")
    made = jax.jit(init, out_shardings=shardings, compiler_options=QUICK)()
    held = dict.fromkeys(mesh.devices.flat, 0)
    split = 0
    for leaf, sharded in zip(jax.tree.leaves(made), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharded, leaf.ndim)
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
        if sharded.spec != PartitionSpec():
            split += 1
            assert all(shard.data.size < leaf.size for shard in leaf.addressable_shards)
    assert split > 40
    assert set(held.values()) == {bytes_per_device(abstract, shardings)}
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(made))
    assert bytes_per_device(abstract, shardings) < 0.4 * whole


@pytest.mark.parametrize(
    ("shape", "before", "axes"),
    [
        ((6, 8), (), (None, "data")),
        ((8, 6), (), ("data",)),
        ((8, 16, 3), (None, "fsdp"), ("data", "fsdp")),
        ((6, 16, 3), (None, "fsdp"), (None, ("fsdp", "data"))),
        ((6, 6, 8), (None, "fsdp", "tensor"), (None, "fsdp", ("tensor", "data"))),
        ((6, 4, 3), (None, "fsdp"), (None, "fsdp")),  # a part of 2 for 4 devices
        ((), (), ()),
    ],
)
def test_state_is_split_along_the_first_dimension_that_divides(shape, before, axes):
    """A part that a device has is split further: its part of the state is one of its part of the weights."""
    mesh = AbstractMesh((4, 2, 2), ("data", "fsdp", "tensor"))
    sharding = split_state(NamedSharding(mesh, PartitionSpec(*before)), shape)
    assert sharding.spec == PartitionSpec(*axes)
    names = [(entry,) if isinstance(entry, str) else entry or () for entry in axes]
    assert state_dimension(sharding) == next((i for i, entry in enumerate(names) if "data" in entry), None)
    alone = NamedSharding(AbstractMesh((1, 2, 2), ("data", "fsdp", "tensor")), PartitionSpec(*before))
    assert split_state(alone, shape) == alone


def test_a_frozen_encoder_is_not_split_further():
    """No step updates it, and every step would gather it."""
    mesh = mesh_of(8, 1, 1)
    _, abstract, shardings = make_state(mesh, "probe", shard_state=True)
    assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves(shardings.params["encoder"]))
    assert state_dimension(shardings.params["head"]["linear"]["kernel"]) == 0
    text = overview(mesh, abstract, shardings)
    whole = text.split("split over mesh.data=8 too (optim.shard_state) but for ")[1].splitlines()[1:]
    assert "  encoder/patch_embed/kernel" in whole
    assert "  head/linear/kernel" not in whole


def test_batch_and_activations():
    """Examples are split over data x fsdp; a model pins its activations without knowing the mesh."""
    mesh = mesh_of(2, 2, 2)
    batch = jax.device_put(np.zeros((8, 3)), batch_sharding(mesh))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 3)}
    pinned = jax.jit(lambda x: make_constrain(mesh)(x, layers.TOKENS))(jnp.zeros((8, 4, 6)))
    assert {shard.data.shape for shard in pinned.addressable_shards} == {(2, 4, 6)}
    assert replicated(mesh).is_fully_replicated


def test_overview_says_what_lies_where_and_why():
    """It is printed at every start and is the first thing to read when memory is short."""
    mesh = mesh_of(4, 2, 1)
    _, abstract, shardings = make_state(mesh, "pretrain")
    text = overview(mesh, abstract, shardings)
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.params))
    assert text.startswith("mesh: data=4 x fsdp=2 x tensor=1 (8 devices)")
    for path, _ in jax.tree_util.tree_leaves_with_path(abstract.params):
        assert path_name(path) in text
    assert f"parameters: {total:,} in " in text
    for part in ("params", "opt_state"):
        size = bytes_per_device(getattr(abstract, part), getattr(shardings, part))
        assert f"{size:,} bytes per device" in text
    assert "whole on every device, mesh axis tensor has size 1: " in text
    assert "whole on every device, small: its rule leaves it whole: " in text
    single = mesh_of(1, 1, 1)
    _, abstract, shardings = make_state(single, "pretrain")
    assert "whole on every device" not in overview(single, abstract, shardings)


CAST = {
    "as the paper's": {},
    "every option": {"layer_scale_init": 0.1, "pos_embed": "learned", "scan": True},
    "cross": {"decoder": "cross", "fuse_blocks": True},
}


@pytest.mark.parametrize("options", list(CAST.values()), ids=list(CAST))
def test_parameters_that_the_model_casts_may_be_cast_before(options):
    """A sharded state is gathered in bfloat16: what a row does not call float32 gives the same loss and gradients."""
    config = smoke.get_config()
    config.model.update(dtype="bfloat16", **options)
    task = make_task(config, 10, PLAIN)
    keys = jax.random.split(jax.random.key(1), 4)
    batch = {"image": jax.random.randint(keys[0], (4, 16, 16, 3), 0, 256).astype(jnp.uint8)}
    # Norms and biases begin as ones and zeros, which any type holds.
    params = jax.tree.map(
        lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), task.init_params(keys[1])
    )
    rows = parameter_rows(params)
    cast = jax.tree.map(lambda x, row: x if row.is_float32 else x.astype(jnp.bfloat16), params, rows)
    grad = jax.jit(
        jax.value_and_grad(lambda params: task.loss(params, batch, keys)[0].mean()),
        compiler_options={**QUICK, "xla_allow_excess_precision": False},
    )
    (loss, grads), (cast_loss, cast_grads) = grad(params), grad(cast)
    assert loss == cast_loss
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), grads, cast_grads)
