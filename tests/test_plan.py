"""Plans for hardware that is not here: what a program exchanges, whether it fits, and the command that says so."""

import dataclasses
import json
import math
import re
import types
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from configs import imagenet_vit_b16, imagenet_vit_h14, imagenet_vit_l16
from mae_dist import errors, hardware
from mae_dist.data import DescribedDataset
from mae_dist.errors import ConfigError
from mae_dist.model.build import abstract_params, param_count
from mae_dist.parallel.mesh import make_mesh, num_slices
from mae_dist.plan import fit, hlo, planning, roofline, topology
from mae_dist.plan import text as plan_text
from tests import QUICK
from tests.runs import run, smoke_config
from tests.test_tfds import prepare_shapes

needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed (extra tpu)")
TINY = {"global_batch_size": 32, "model__depth": 2, "model__scan": True}


def exchanged(fn, x, **specs):
    """The exchanges of `fn` on eight devices, by kind."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    step = jax.jit(jax.shard_map(fn, mesh=mesh, check_vma=False, **specs), compiler_options=QUICK)
    text = step.lower(x).compile().as_text()
    assert text is not None
    return hlo.Program(text, 8).collectives()


def test_collectives_of_a_real_program():
    """Every kind, in loops within loops, with the bytes that we know it moves."""

    def turn(x, _):
        def inner(x, _):
            return x + jax.lax.psum(x, "x"), None

        x, _ = jax.lax.scan(inner, x, length=3)
        return jax.lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)]), None

    def fn(x):  # (16, 4) float32 on each device
        x, _ = jax.lax.scan(turn, x, length=5)
        x = jax.lax.all_to_all(x, "x", 0, 0, tiled=True)
        x = jax.lax.psum_scatter(x, "x", tiled=True)  # (2, 4)
        return jax.lax.all_gather(x, "x", tiled=True)

    found = exchanged(fn, jnp.zeros((128, 4)), in_specs=P("x"), out_specs=P())
    local = 16 * 4 * 4
    by_kind = {item.kind: item for item in found}
    assert len(found) == len(by_kind)
    assert {kind: item.count for kind, item in by_kind.items()} == {
        "all-reduce": 15,
        "collective-permute": 5,
        "all-to-all": 1,
        "reduce-scatter": 1,
        "all-gather": 1,
    }
    assert {item.payload for item in found} == {local}
    assert all(sorted(item.group) == list(range(8)) for item in found)
    rings = {kind: item.ring_bytes for kind, item in by_kind.items()}
    assert rings["all-reduce"] == 2 * rings["all-gather"] == 2 * 7 / 8 * local
    assert rings["collective-permute"] == local


# As the TPU's compiler writes them: an asynchronous pair, a chain of fusions that is one all-gather, an all-reduce of
# which chips keep a part, a loop that begins at 1 and counts by 2, and what is handed to the network between slices.
WRITTEN = """HloModule jit_step

%piece.1 (p: bf16[8]) -> bf16[64] {
  ROOT %all-gather.1 = bf16[64]{0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}, frontend_attributes={chain_id="3"}
}

%piece.2 (p: bf16[8]) -> bf16[64] {
  ROOT %all-gather.2 = bf16[64]{0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}, frontend_attributes={chain_id="3"}
}

%all-reduce-scatter.1 (p: f32[64]) -> f32[8] {
  %all-reduce.9 = f32[64]{0:T(8)S(1)} all-reduce(%p), channel_id=4, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  ROOT %slice = f32[8]{0} dynamic-slice(%all-reduce.9, %i)
}

%condition (p: (u32[], f32[4])) -> pred[] {
  %limit = u32[]{:T(128)} constant(8)
  %i = u32[] get-tuple-element(%p), index=0
  ROOT %compare.1 = pred[] compare(%i, %limit), direction=LT
}

%body (p: (u32[], f32[4])) -> (u32[], f32[4]) {
  %two = u32[] constant(2)
  %i = u32[] get-tuple-element(%p), index=0
  %x = f32[4] get-tuple-element(%p), index=1
  %start = (f32[4]{0:T(128)}, f32[4]{0}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %done = f32[4] collective-permute-done(%start)
  %next = u32[] add(%i, %two)
  ROOT %out = (u32[], f32[4]) tuple(%next, %done)
}

ENTRY %main (x: bf16[8]) -> bf16[64] {
  %one = u32[] constant(1)
  %copied = u32[]{:S(6)} copy(%one)
  %begin = (u32[], f32[4]) tuple(%copied, %y)
  %loop = (u32[], f32[4]) while(%begin), condition=%condition, body=%body
  %first = bf16[64] fusion(%x), kind=kOutput, calls=%piece.1
  %second = bf16[64] fusion(%x), kind=kOutput, calls=%piece.2
  %scattered = f32[8] fusion(%z), kind=kCustom, calls=%all-reduce-scatter.1
  %ag = (bf16[8]{0}, bf16[32]{0}) all-gather-start(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %got = bf16[32] all-gather-done(%ag)
  %turned = bf16[16] all-gather(%x), channel_id=9, replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_2'}, dimensions={0}
  %send.1 = (f32[2,8]{1,0}, u32[], token[]) send(%z, %token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send.1), channel_id=2, is_host_transfer=true
  ROOT %end = bf16[64] add(%first, %second)
}
"""  # noqa: E501


def test_what_only_a_tpu_writes():
    """Each once, however many instructions it takes."""
    found = hlo.Program(WRITTEN, 8, num_slices=2).collectives()
    assert found == [
        hlo.Collective("collective-permute", 16, (0, 1, 2, 3), 4),  # at 1, 3, 5 and 7
        hlo.Collective("all-gather", 128, (0, 1, 2, 3), 1),
        hlo.Collective("reduce-scatter", 256, (0, 2, 4, 6), 1),
        hlo.Collective("all-gather", 64, (0, 1, 2, 3), 1),
        hlo.Collective("all-gather", 32, (0, 4), 1),
        hlo.Collective("all-reduce", 64, (0, 8), 1, across_slices=True),
    ]


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("", range(8)),
        ("{}", range(8)),
        ("{{0,5},{1,4}}", (0, 5)),
        ("[4,2]<=[8]", (0, 1)),
        ("[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("mesh['a'=2,'b'=4] {'a','b'}", range(8)),
        ("mesh['a'=2,'b'=2,'c'=2], device_ids=([2,2,2]T(2,1,0)) {'b','c'}", (0, 4, 2, 6)),
        ("mesh['a'=2,'b'=4], device_ids=(7,6,5,4,3,2,1,0) {'b'}", (7, 6, 5, 4)),
    ],
)
def test_groups(groups, first):
    """In each form that a compiler writes, however the mesh lies over the devices."""
    told = f", replica_groups={groups}" if groups else ""
    text = f"ENTRY %main (x: f32[2]) -> f32[2] {{\n  ROOT %sum = f32[2] all-reduce(%x){told}, to_apply=%add\n}}"
    (found,) = hlo.Program(text, 8).collectives()
    assert found.group == tuple(first)


def test_groups_in_an_unknown_form_are_not_taken_for_all():
    text = WRITTEN.replace("{{0,1,2,3},{4,5,6,7}}", "mesh['a'=8] {'a':(2)4}")
    with pytest.raises(AssertionError, match=r"replica groups in an unknown form: mesh\['a'=8\]"):
        hlo.Program(text, 8).collectives()


def test_a_loop_of_unknown_length_is_said():
    """Counted as one turn, but not in silence."""
    program = hlo.Program(WRITTEN.replace("constant(8)", "parameter(1)"), 8)
    assert program.collectives()[0].count == 1
    assert program.uncounted_loops == ["body"]


def examine(config, place):
    return planning.examine(config, place, planning.described_data(config))


def sweep(config, place, num_compiled):
    return planning.sweep(config, place, planning.described_data(config), num_compiled)


def test_a_sharded_state_exchanges_as_theory_says():
    """Gradients scattered and parameters gathered, each once, and little memory for the state."""
    report = examine(smoke_config(**TINY, accum_steps=2, optim__shard_state=True), topology.describe("cpu:8", 1))
    found = {row["kind"]: row for row in report["collectives"] if row["payload_bytes"] > 10_000}
    assert set(found) == {"reduce-scatter", "all-gather"}
    assert found["reduce-scatter"]["payload_bytes"] == pytest.approx(4 * report["parameters"], rel=0.05)
    total = sum(row["ring_bytes"] for row in report["collectives"])
    assert total == pytest.approx(report["expected"]["ICI"], rel=0.05)
    state = report["memory"]["parameters"] + report["memory"]["optimizer_state"]
    assert 12 * report["parameters"] / 8 <= state < 12 * report["parameters"] / 8 * 1.2


@pytest.mark.long
def test_gradients_are_exchanged_as_theory_says():
    """Data parallelism: the float32 gradients once, whatever loops the step has; fsdp: each weight, each pass."""
    place = topology.describe("cpu:8", 1)
    report = examine(smoke_config(**TINY, accum_steps=2), place)
    (row,) = (row for row in report["collectives"] if row["payload_bytes"] > 1000)
    assert row["kind"] == "all-reduce"
    assert row["payload_bytes"] == pytest.approx(4 * report["parameters"], rel=0.01)
    assert row["ring_bytes"] == pytest.approx(report["expected"]["ICI"], rel=0.01)
    assert report["fits"]
    assert report["memory"]["chip"] is None
    assert report["step_secs"] is None, "nothing is published of a CPU"


def foreseen(**changes):
    """What is said of each mesh of four devices without compiling, by its (data, fsdp, tensor)."""
    config = smoke_config(**TINY, classify__head="linear", **changes)
    report = sweep(config, topology.describe("cpu:4", 1), 0)
    return {tuple(row["mesh"].values()): row for row in report["sweep"]}


CACHED = {"task": "probe", "init_from": "unused"}
FROZEN = {**CACHED, "data__augment": "flip"}


@pytest.mark.long
def test_compute_of_a_frozen_encoder(monkeypatch):
    """Nothing of it is computed again, and with cached features nothing at all."""
    monkeypatch.setattr(roofline.hardware, "peak_flops", lambda kind, dtype: 1e12)
    trained, frozen, cached = (
        [foreseen(**task, model__remat=remat)[4, 1, 1]["secs"]["compute"] for remat in ("none", "blocks")]
        for task in ({}, FROZEN, CACHED)
    )
    assert trained[1] == pytest.approx(trained[0] * 4 / 3)
    assert frozen[1] == frozen[0]
    assert cached[1] == cached[0] < frozen[0] / 50


def test_exchange_of_a_frozen_encoder():
    """It is gathered and its activations are summed for the forward pass alone; with cached features not even so."""
    frozen, cached = (
        {mesh: row["expected"]["ICI"] for mesh, row in foreseen(**task).items()} for task in (FROZEN, CACHED)
    )
    assert frozen[4, 1, 1] == cached[4, 1, 1] == 2 * 3 / 4 * 4 * (32 + 1) * 10, "the gradient of the head"
    assert cached[1, 4, 1] == 3 * 3 / 4 * 4 * 32 * 10 + 2 * 3 / 4 * 4 * 10, "its kernel is split, its bias is not"
    assert frozen[1, 4, 1] > 2 * cached[1, 4, 1]
    tokens = 2 * (16 + 1)  # of both blocks
    assert frozen[2, 1, 2] - cached[2, 1, 2] == 2 * (2 * 1 / 2) * 16 * tokens * 32 * 4


def compiled_to(monkeypatch, *results):
    """Lets the compiler give these results in turn; returns what was given to it."""
    given, left = [], iter(results)
    monkeypatch.setattr(topology, "compile_step", lambda step, mesh, *args: given.append(mesh) or next(left))
    return given


REFUSED = topology.Compiled("", 2**10, 0, 2**30, 0, limit=2**29, refusal="RESOURCE_EXHAUSTED: too much")
SUM_OF_ALL = "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (1.5G) exceeds available HBM (1.0G)."
TOLD_APART = "RESOURCE_EXHAUSTED: Used 1.5G of 1.0G hbm.\n    arguments 0.5G\n"


def test_averages_take_memory(monkeypatch):
    """As much as the parameters, known even where the compiler refuses."""
    sizes, reasons = [], []
    for decay in (0.0, 0.999):
        compiled_to(monkeypatch, REFUSED)
        report = examine(smoke_config(**TINY, ema_decay=decay), topology.describe("cpu:4", 1))
        sizes.append(report["memory"])
        reasons.append(" ".join(report["reasons"]))
    assert [memory["averages"] for memory in sizes] == [0, 4 * report["parameters"]]
    assert sizes[1]["total"] - sizes[0]["total"] == sizes[1]["averages"]
    assert ["parameters + optimizer state + averages" in why for why in reasons] == [False, True]


def test_a_refusal_tells_one_sum_or_its_parts(monkeypatch):
    """What is not told of the arguments is known: parameters, moments and batch."""
    for message in (SUM_OF_ALL, TOLD_APART):
        compiled_to(monkeypatch, topology._refused(message))
        memory = examine(smoke_config(**TINY), tpu_of_cpus(monkeypatch))["memory"]
        assert memory["total"] == 1.5 * 2**30
        known = sum(memory[name] for name in ("parameters", "optimizer_state", "averages", "batch", "padding"))
        assert memory["temporaries"] == memory["total"] - known > 0
        assert memory["chip"] == 2**30
    assert memory["temporaries"] == 2**30


def test_why_it_does_not_fit(monkeypatch):
    """The largest part first; what it would be, split over all chips; and what else that splits."""
    place, model = tpu_of_cpus(monkeypatch), {**TINY, "model__embed_dim": 512, "model__decoder_embed_dim": 512}
    compiled_to(monkeypatch, REFUSED, topology.Compiled("", 1, 0, 2**10, 0, limit=2**9, refusal="RESOURCE_EXHAUSTED"))
    report = examine(smoke_config(**model), place)
    state, grads = (size * 4 * report["parameters"] / 2**30 for size in (3, 1))
    activations, copies = report["reasons"]
    assert activations.startswith(
        "activations and other temporaries of 4 images at once 1.00 GiB "
        f"({grads:.2f} GiB of it float32 gradients, which mesh.fsdp splits too): lower global_batch"
    )
    assert copies == (
        f"parameters + optimizer state {state:.2f} GiB are whole on every chip: set optim.shard_state=True or "
        f"raise mesh.fsdp ({state / 8:.2f} GiB over a whole slice)"
    )
    assert "it does not fit: 1." in plan_text.text(report, place)
    first, second = examine(smoke_config(**model, mesh__fsdp=4), place)["reasons"]
    assert first.startswith("parameters + optimizer state")
    assert f"are split over 4: set optim.shard_state=True or raise mesh.fsdp ({state / 8:.2f} GiB over a w" in first
    assert "gradients" not in second


@pytest.mark.parametrize("masking", ["user", "grid"])
def test_what_a_mask_keeps(tmp_path, masking):
    """FLOPs and exchanges are those of random masks that keep as many, whatever ratio stands beside a user's mask.

    Of a regular grid the ratio is rounded as it is written: 36 (1 - .888889) is less than the 4 patches that stay.
    """
    mask = np.zeros((6, 6), np.int32)
    mask[:, 1:] = 1
    np.save(tmp_path / "mask.npy", mask)
    changes = {
        "user": {"model__mask_ratio": 0.5, "model__mask_file": str(tmp_path / "mask.npy")},
        "grid": {"model__mask_ratio": 0.888889},
    }
    kept = {"user": 6, "grid": 4}[masking]
    size = {"model__image_size": (24, 24), "model__patch_size": (4, 4)}
    found = foreseen(**size, model__masking=masking, **changes[masking])[2, 1, 2]
    expected = foreseen(**size, model__mask_ratio=1 - (kept + 0.5) / 36)[2, 1, 2]
    assert found["flops_per_image"] == expected["flops_per_image"]
    assert found["expected"]["ICI"] == expected["expected"]["ICI"]


@pytest.mark.long
def test_accumulation_repeats_exchanges():
    """On a data-parallel mesh gradients are summed once all the same; a head trained on all features at once gets its
    own once anywhere."""

    def exchanged(accum_steps, **changes):
        found = foreseen(accum_steps=accum_steps, **changes)
        return {mesh: found[mesh]["expected"]["ICI"] for mesh in ((4, 1, 1), (2, 2, 1), (1, 4, 1))}

    once, twice = exchanged(1), exchanged(2)
    assert [twice[mesh] / once[mesh] for mesh in once] == [1, 2, 2]
    once, twice = (exchanged(count, **FROZEN, classify__batch_norm=True) for count in (1, 2))
    head = exchanged(1, **CACHED)
    for mesh in once:
        assert twice[mesh] - head[mesh] == 2 * (once[mesh] - head[mesh])


@pytest.mark.long
def test_exchanges_on_a_mesh_of_two_axes():
    """Weights are gathered among the chips of one axis, and the rest of their gradients summed over the other."""
    report = examine(smoke_config(**TINY, mesh__data=2, mesh__fsdp=4), topology.describe("cpu:8", 1))
    chips_of = {kind: {row["chips"] for row in report["collectives"] if row["kind"] == kind} for kind in hlo.KINDS}
    assert chips_of["all-gather"] == {4}
    assert chips_of["all-reduce"] == {2, 4, 8}


@pytest.mark.long
@pytest.mark.parametrize(("scan", "fuse_blocks"), [(False, False), (True, True)])
def test_exchanges_of_a_cross_decoder(scan, fuse_blocks):
    """Over tensor: sums of its queries, and of the gradient of what it reads, by the formula."""
    cross = {"model__decoder": "cross", "model__decoder_depth": 2, "model__fuse_blocks": fuse_blocks}
    options = {**TINY, **cross, "model__scan": scan, "model__predict_ratio": 0.5}
    report = examine(smoke_config(**options, mesh__data=1, mesh__tensor=2), topology.describe("cpu:2", 1))
    found = sum(row["ring_bytes"] for row in report["collectives"])
    assert found == pytest.approx(report["expected"]["ICI"], rel=1e-3)


@pytest.mark.long
def test_command(child_env, tmp_path):
    """On a machine without accelerator and without the data set."""
    out = tmp_path / "plan.json"
    code, output = run(
        child_env(8),
        "--config=configs/cifar_small.py",
        "--config.cpu.pieces=1",
        "--config.model.depth=1",
        "--topology=cpu:8",
        "--global_batch_size=64",
        f"--json={out}",
        module="plan",
    )
    assert code == errors.EXIT_DONE, output
    report = json.loads(out.read_text())
    assert report["num_examples"] == 40_000
    assert report["global_batch_size"] == 64
    for line in ("8 x cpu, mesh data=8 x fsdp=1 x tensor=1", "float32 gradients summed once", "1.000 of it"):
        assert line in output


@pytest.mark.long
def test_report_without_a_directory(child_env, tmp_path):
    """Refused before anything is compiled, and not by the exit code of what does not fit."""
    for out in (tmp_path / "none" / "plan.json", tmp_path):
        code, output = run(child_env(), "--config=configs/smoke.py", "--topology=cpu:1", f"--json={out}", module="plan")
        assert code == errors.EXIT_CONFIG, output
        assert f"--json={out}: a file in a directory that exists is needed" in output
        assert "compiled in" not in output


def test_data_are_not_made_for_a_plan(tmp_path):
    """Not where a preparation was broken off, nor what a config stages or caches; what is whole is looked at."""
    (tmp_path / "cifar10" / "3.0.2").mkdir(parents=True)
    config = smoke_config(data__source="tfds", data__data_dir=str(tmp_path), data__name="cifar10")
    assert isinstance(planning.described_data(config).train, DescribedDataset)
    config.data.update(name="shapes", train_split="train", val_split="test", test_split="")
    (tmp_path / "shapes" / "1.0.0").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"'shapes': neither is it in data.data_dir nor is its size known here"):
        planning.described_data(config)
    whole, cache = tmp_path / "whole", tmp_path / "cache"
    prepare_shapes(whole, sizes=[(16, 16)] * 12, fixed=True)
    config.data.update(data_dir=str(whole), cache_dir=str(cache), stage=True, cache="memory")
    data = planning.described_data(config)
    assert data.val is not None
    assert (data.train.num_examples, data.val.num_examples, data.train.num_classes) == (12, 6, 3)
    assert not cache.exists()


def test_without_libtpu(monkeypatch):
    """The cure is one line."""
    monkeypatch.setattr(topology, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the TPU's compiler, no TPU: pip install -e \.\[tpu\]"):
        topology.describe("v5e:4x4", 1)


@pytest.mark.parametrize(
    ("name", "slices"),
    [("v5e", 1), ("v9:2x2", 1), ("cpu:2x2", 1), ("cpu:0", 1), ("cpu:9", 1), ("cpu:8", 2), ("v5e:2x2", 0)],
)
def test_topologies_that_do_not_exist(name, slices):
    with pytest.raises(ConfigError, match=rf"--topology={name}"):
        topology.describe(name, slices)


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("v5e:16x32", "512 chips, and a slice of v5e has at most 256; .*: --topology=v5e:16x16 --num_slices=2"),
        ("v5p:16x32x16", "a slice of v5p has at most 6144; .*: --topology=v5p:16x16x16 --num_slices=2"),
        ("v4:4x4", "a slice of v4 has 3 sides, as v4:4x4x4"),
        ("v6e:2x2x2", "a slice of v6e has 2 sides, as v6e:4x4"),
        ("tpu7x:16x24x32", "a slice of tpu7x has at most 9216; .*: --topology=tpu7x:16x16x24 --num_slices=2"),
    ],
)
def test_slices_that_nobody_can_have(name, cure):
    """The compiler would take them."""
    with pytest.raises(ConfigError, match=rf"--topology={name}: .*{cure}") as refused:
        topology.describe(name, 1)
    advised = re.search(r"--topology=(\S+) --num_slices=(\d+)$", str(refused.value))
    if advised and name.startswith("v5e"):  # thousands of chips take seconds
        assert len(topology.describe(advised[1], int(advised[2])).devices) == 512


def test_sweep():
    """Every mesh that divides, once; the state of one chip shrinks with fsdp."""
    report = sweep(smoke_config(**TINY), topology.describe("cpu:4", 1), 0)
    meshes = {tuple(row["mesh"].values()): row for row in report["sweep"]}
    # Two decoder heads: no tensor=4.
    assert set(meshes) == {(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2)}
    assert len(report["sweep"]) == len(meshes)
    assert meshes[1, 4, 1]["state_bytes"] < meshes[2, 2, 1]["state_bytes"] < meshes[4, 1, 1]["state_bytes"]
    order = [row["expected"]["ICI"] for row in report["sweep"]]
    assert order == sorted(order)
    text = plan_text.sweep_text(report)
    assert text.count("(theory)") == 5
    assert "data=2 x fsdp=1 x tensor=2" in text


def tpu_of_cpus(monkeypatch):
    """Eight devices that the tables take for a slice of v5e, with 1e14 FLOP/s each."""
    monkeypatch.setattr(roofline.hardware, "peak_flops", lambda kind, dtype: 1e14)
    return dataclasses.replace(topology.describe("cpu:8", 1), name="v5e:2x4", generation="v5e", shape=(2, 4))


PROGRAM = "ENTRY %main (x: f32[2]) -> f32[2] {\n  ROOT %x = f32[2] parameter(0)\n}"
FITTING = topology.Compiled(PROGRAM, 2**20, 0, 2**30, 0)
TOO_LARGE = topology.Compiled(PROGRAM, 2**20, 0, 40 * 2**30, 0)


@pytest.mark.long
def test_sweep_beyond_what_the_compiler_refuses(monkeypatch):
    """Until as many fit as are wanted; those first, then what is not known to fail, then what fails."""
    place = tpu_of_cpus(monkeypatch)
    given = compiled_to(monkeypatch, REFUSED, FITTING, TOO_LARGE, FITTING)
    report = sweep(smoke_config(**TINY), place, 2)
    assert len(given) == 4
    told = [(row["compiled"], row["fits"]) for row in report["sweep"]]
    theory = [(False, True)] * (len(told) - 4)
    assert told == [(True, True)] * 2 + theory + [(True, False)] * 2
    assert len({tuple(row["mesh"].values()) for row in report["sweep"]}) == len(told) > 4
    best, second = report["sweep"][:2]
    assert best["step_secs"] <= second["step_secs"]
    assert best["step_secs"] > max(row["step_secs"] for row in report["sweep"][2:-2]), "it counts memory too"
    assert report["fits"]
    assert plan_text.sweep_text(report).count("does not fit") == 2


def test_sweep_of_which_nothing_fits(monkeypatch):
    """The exit code does not rest on meshes of which only the state is known, nor is everything compiled."""
    place = tpu_of_cpus(monkeypatch)
    given = compiled_to(monkeypatch, TOO_LARGE, REFUSED, TOO_LARGE)
    report = sweep(smoke_config(**TINY), place, 1)
    assert len(given) == 3
    assert any(row["fits"] for row in report["sweep"])
    assert not report["fits"]
    assert "none of those that were compiled fits" in plan_text.sweep_text(report)


def test_the_settings_that_fit(monkeypatch):
    """In the order of theory, until none that is left could be faster."""
    place, config = tpu_of_cpus(monkeypatch), smoke_config(**TINY | {"global_batch_size": 1024})
    given = compiled_to(monkeypatch, TOO_LARGE, TOO_LARGE, dataclasses.replace(FITTING, temporaries=2**10))
    data = planning.described_data(config)
    found = list(fit.search(config, place, data, planning.examine(config, place, data)))
    assert [row["fits"] for row in found] == [False, False, True]
    assert found[0]["settings"]["optim.shard_state"] is False
    assert len({tuple(row["settings"].values()) for row in found}) == len(given) == 3
    chosen = fit.best(found)
    assert chosen is not None
    assert chosen is found[2]
    changed = {name: value for name, value in chosen["settings"].items() if value != found[0]["settings"][name]}
    assert changed
    assert plan_text.proposal(found, chosen) == "proposed: " + " ".join(f"--config.{n}={v}" for n, v in changed.items())
    lines = [plan_text.fit_line(row) for row in found]
    assert "does not fit in 16.00 GiB" in lines[0]
    assert f"{chosen['mfu_ceiling']:.2f}" in lines[2]


def test_the_batch_that_fits(monkeypatch):
    """Where no setting fits: the largest half, quarter, … by what the larger one needed."""
    place, config = tpu_of_cpus(monkeypatch), smoke_config(**TINY | {"global_batch_size": 1024})
    given = compiled_to(monkeypatch, *[TOO_LARGE] * (1 + fit.COMPILATIONS), FITTING)
    data = planning.described_data(config)
    found = list(fit.search(config, place, data, planning.examine(config, place, data)))
    tried = [(row["global_batch_size"], row["fits"]) for row in found]
    # 40 GiB of 16: a half is too much, a quarter is not
    assert tried == [(1024, False)] * (1 + fit.COMPILATIONS) + [(256, True)]
    assert len(given) == len(found)
    assert "--config.global_batch_size=256" in plan_text.proposal(found, fit.best(found))


def test_links():
    """Both links of a ring, one where a side is open; a side that the group does not span gives none."""
    chip = hardware.CHIPS["v5e"]
    row = [(i, 0, 0) for i in range(16)]
    assert hardware.ici_bytes_per_sec(chip, row, (16, 16)) == 2 * chip.link_bytes_per_sec
    assert hardware.ici_bytes_per_sec(chip, row[:4], (16, 16)) == chip.link_bytes_per_sec
    assert hardware.ici_bytes_per_sec(chip, [(i, j, 0) for i in range(4) for j in range(4)], (4, 4)) == 100e9
    whole = [(i, j, k) for i in range(4) for j in range(4) for k in range(4)]
    assert hardware.ici_bytes_per_sec(hardware.CHIPS["v4"], whole, (4, 4, 4)) == 300e9  # the published six links
    flat = [point for point in whole if point[0] < 2]
    points = [(i, j, 0) for i in range(2) for j in range(4)]
    whole_slice = hlo.Collective("collective-permute", 100e9, tuple(range(8)), 1)
    place = topology.Topology("v5e:2x4", "v5e", (2, 4), 1, tuple(types.SimpleNamespace(coords=at) for at in points))
    secs = roofline.link_secs([whole_slice], place, place.devices)
    assert secs == {"ici": 1.0}, "no side is a ring"
    assert hardware.ici_bytes_per_sec(hardware.CHIPS["v4"], flat, (2, 4, 4)) == 150e9, (
        "rings are made of whole cubes only"
    )


def test_two_devices_share_the_links_of_a_chip():
    """On tpu7x both of a chip's devices have its coordinates."""
    chip = hardware.CHIPS["tpu7x"]
    chips = [(i, j, k) for i in range(4) for j in range(4) for k in range(4)]
    assert hardware.ici_bytes_per_sec(chip, chips, (4, 4, 4)) == 300e9, "the others exchange over the same six links"
    assert hardware.ici_bytes_per_sec(chip, [at for at in chips for _ in range(2)], (4, 4, 4)) == 600e9
    assert hardware.ici_bytes_per_sec(chip, chips[:1] * 2, (4, 4, 4)) == 600e9, "within the chip, no links"


@pytest.mark.parametrize(
    ("module", "millions"), [(imagenet_vit_b16, 111.9), (imagenet_vit_l16, 329.5), (imagenet_vit_h14, 657.0)]
)
def test_paper_models(module, millions):
    """Parameters of the paper's code, whose fixed positions (196 or 256, and the class token's) are counted, too."""
    config = module.get_config()
    count = param_count(abstract_params(config, 0))
    positions = (math.prod(config.model.image_size) // math.prod(config.model.patch_size) + 1) * (
        config.model.embed_dim + config.model.decoder_embed_dim
    )
    assert (count + positions) / 1e6 == pytest.approx(millions, abs=0.1)
    assert DescribedDataset("imagenet2012", config.data.train_split).num_examples == 1_281_167


@needs_libtpu
class TestTpu:
    """With the TPU's own compiler, for chips that are not here."""

    @pytest.fixture(autouse=True)
    def no_accelerator(self):
        topology.use_no_accelerator()

    @pytest.mark.parametrize(("fsdp", "above"), [(4, 1.05), pytest.param(2, 1.1, marks=pytest.mark.long)])
    def test_fits(self, fsdp, above):
        """The real step; weights, not activations, go over fsdp, as theory says: gathered at once, at this width.

        With data=2 x fsdp=2 some gradients are summed whole before each chip takes its part: 1.08.
        """
        place = topology.describe("v5e:2x2", 1)
        widths = {"model__embed_dim": 256, "model__num_heads": 2, "model__decoder_embed_dim": 128}
        report = examine(smoke_config(**TINY, **widths, model__dtype="bfloat16", mesh__fsdp=fsdp), place)
        assert report["fits"]
        assert report["memory"]["chip"] == 16 * 2**30
        state = report["memory"]["parameters"] + report["memory"]["optimizer_state"]
        assert state < 1.1 * 12 * report["parameters"] / fsdp
        assert report["bound_by"] in ("compute", "hbm", "ici")
        assert 0 < report["mfu_ceiling"] < 1
        found = sum(row["ring_bytes"] for row in report["collectives"])
        assert 0.95 < found / report["expected"]["ICI"] < above
        assert report["expected"]["ICI_in_loops"] > 1.5 * found

    @pytest.mark.parametrize(
        ("slices", "exchange"), [(1, "bfloat16"), pytest.param(2, "float32", marks=pytest.mark.long)]
    )
    def test_a_sharded_state(self, slices, exchange):
        """Gradients scattered and parameters gathered in their types, within a slice before across slices."""
        place = topology.describe("v5e:2x2", slices)
        widths = {"model__embed_dim": 256, "model__num_heads": 2, "model__decoder_embed_dim": 128}
        options = {"optim__shard_state": True, "optim__grad_exchange": exchange, "model__dtype": "bfloat16"}
        report = examine(smoke_config(**TINY, **widths, **options), place)
        expected = report["expected"]
        found = {"ICI": 0.0, "DCN": 0.0}
        for row in report["collectives"]:
            found[row["network"]] += row["ring_bytes"]
        if slices == 1:  # some sums are made whole
            assert 0.95 * expected["ICI"] < found["ICI"] < 1.05 * expected["ICI_summed_whole"]
        else:
            assert found == pytest.approx({name: expected[name] for name in found}, rel=0.1)

    @pytest.mark.parametrize("name", ["v4:1x1x1", "v5e:1x1", "v5p:1x1x1", "v6e:1x1", "tpu7x:1x1x1"])
    def test_a_single_chip(self, name):
        """Less than the compiler takes a host to have."""
        place = topology.describe(name, 1)
        assert place.chip is not None
        assert len(place.devices) == place.chip.devices
        assert hardware.peak_flops(place.devices[0].device_kind, "bfloat16")

    def test_the_inner_axis_lies_within_the_chips(self):
        """Of tpu7x, where two devices have a chip's coordinates."""
        mesh = make_mesh({"data": -1, "fsdp": 2, "tensor": 1}, topology.describe("tpu7x:2x2x1", 1).devices)
        chips = [{tuple(device.coords) for device in row.flat} for row in mesh.devices]
        assert [len(row) for row in chips] == [1] * 4
        assert len(set.union(*chips)) == 4

    @pytest.mark.long
    def test_a_chip_of_two_devices(self):
        """The real step for tpu7x: both devices of each chip, each with half of its memory."""
        place = topology.describe("tpu7x:2x2x1", 1)
        widths = {"model__embed_dim": 256, "model__num_heads": 2, "model__decoder_embed_dim": 128}
        report = examine(smoke_config(**TINY, **widths, model__dtype="bfloat16", mesh__fsdp=2), place)
        assert report["fits"]
        assert (report["chips"], report["devices_per_chip"], report["device_kind"]) == (8, 2, "TPU7x")
        assert report["peak_flops"] == 2307e12 / 2
        assert 90 * 2**30 < report["memory"]["chip"] <= 96 * 2**30
        assert 0 < report["mfu_ceiling"] < 1
        assert "a chip has 2 devices here (4 chips)" in plan_text.text(report, place)

    @pytest.mark.long
    def test_does_not_fit(self, child_env, tmp_path):
        """The compiler refuses, the report says why, and the exit code is 1."""
        out = tmp_path / "plan.json"
        options = ("--config=configs/smoke.py", "--config.model.depth=1", "--config.eval.batch_size=32")
        asked = ("--topology=v5e:2x2", f"--global_batch_size={2**20}", "--nofit", f"--json={out}")
        code, output = run(child_env(), *options, *asked, module="plan")
        assert code == 1, output
        report = json.loads(out.read_text())
        assert not report["fits"]
        assert "RESOURCE_EXHAUSTED" in report["refusal"]
        assert report["memory"]["total"] > report["memory"]["chip"] > 15 * 2**30
        why = r"it does not fit: \S+ GiB needed, 15.75 GiB there\n  activations and other temporaries of 262144 images"
        assert re.search(why, output)
        assert "lower global_batch_size, raise accum_steps" in output

    @pytest.mark.long
    def test_a_refusal_counts_arguments(self):
        """Its sum of "temporaries" is with them: here 16 GiB, beside which a step only sorts one of them."""
        place = topology.describe("v5e:1x1", 1)
        mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, place.devices)
        shapes = [jax.ShapeDtypeStruct((gib * 2**28,), jnp.float32) for gib in (1, 15)]
        whole = jax.sharding.NamedSharding(mesh, P())
        step = jax.jit(lambda x, y: jnp.sort(x) + y.sum(), in_shardings=(whole, whole), out_shardings=whole)
        compiled = topology.compile_step(step, mesh, *shapes)
        assert compiled.refusal
        assert (compiled.arguments, compiled.limit) == (0, 15.75 * 2**30)
        assert compiled.temporaries > 16 * 2**30, "less than the arguments alone"

    @pytest.mark.long
    def test_two_slices(self):
        """Data across them, all else within; what goes between them is told apart."""
        place = topology.describe("v5e:2x2", 2)
        mesh = make_mesh({"data": -1, "fsdp": 2, "tensor": 1}, place.devices)
        assert mesh.shape == {"data": 4, "fsdp": 2, "tensor": 1}
        assert num_slices(mesh.devices.flat) == 2
        for row in mesh.devices:
            assert len({device.slice_index for device in row.flat}) == 1
        slices = [row.flat[0].slice_index for row in mesh.devices]
        assert slices == [0, 0, 1, 1]
        step = jax.jit(
            jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
        )
        compiled = topology.compile_step(step, mesh, jax.ShapeDtypeStruct((256, 1024), jnp.float32))
        found = hlo.Program(compiled.text, 4, 2).collectives()
        across = [item for item in found if item.across_slices]
        assert (
            sum(item.payload * item.count for item in across) == 256 * 1024 * 4 / 2
        )  # each of two chips hands on half
        assert any(not item.across_slices and len(item.group) == 2 for item in found)

    def test_more_slices_than_copies(self):
        place = topology.describe("v5e:2x2", 2)
        with pytest.raises(ConfigError, match=r"mesh.data=1 is not a multiple of the 2 slices.*a divisor of 4"):
            make_mesh({"data": 1, "fsdp": 8, "tensor": 1}, place.devices)
