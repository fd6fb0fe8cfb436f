"""The analytic count against XLA's count of an unrolled model, published numbers, and the peak table."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from mae_dist import hardware
from mae_dist.config import get_config
from mae_dist.model import flops
from mae_dist.model.build import functional, make_model
from mae_dist.model.hooks import PLAIN
from tests.runs import smoke_config

SMALL = {
    "model__image_size": (32, 24),
    "model__patch_size": (8, 4),
    "model__channels": 3,
    "model__embed_dim": 48,
    "model__depth": 3,
    "model__mlp_ratio": 4.0,
}


def _block(x: jax.Array, heads: int, mlp_dim: int) -> jax.Array:
    """Computes the matmuls of one transformer block, x (N, D), with weights of ones and nothing else."""
    n, d = x.shape
    square = jnp.ones((d, d))
    q, k, v = ((x @ square).reshape(n, heads, d // heads) for _ in range(3))
    scores = jnp.einsum("nhd,mhd->hnm", q, k)
    x = jnp.einsum("hnm,mhd->nhd", scores, v).reshape(n, d) @ square
    return x @ jnp.ones((d, mlp_dim)) @ jnp.ones((mlp_dim, d))


def _xla_flops(fn, *shapes: tuple[int, ...]) -> float:
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    analysis = jax.jit(fn).lower(*args).cost_analysis()
    assert analysis is not None
    return analysis["flops"]


def test_mae_count_is_that_of_xla_for_the_same_matmuls():
    num_keep, num_patches, patch_dim, width = 6, 24, 96, 32

    def forward(kept, restored):
        x = jnp.concatenate([jnp.ones((1, 48)), kept @ jnp.ones((patch_dim, 48))])
        for _ in range(3):
            x = _block(x, heads=4, mlp_dim=192)
        embedded = x @ jnp.ones((48, width))
        y = restored
        for _ in range(2):
            y = _block(y, heads=2, mlp_dim=64)
        return embedded, y[1:] @ jnp.ones((width, patch_dim))

    expected = _xla_flops(forward, (num_keep, patch_dim), (num_patches + 1, width))
    decoder = {"model__decoder_embed_dim": width, "model__decoder_depth": 2, "model__decoder_mlp_ratio": 2.0}
    config = smoke_config(**SMALL, **decoder, model__cls_token="learned")
    counted = flops.train_flops_per_image(config, 0, num_keep, 3)
    assert counted / 3 == pytest.approx(expected, rel=1e-3)


def _matmul_flops(jaxpr: Any) -> int:
    """Counts those of every matmul in a program without loops."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            operand = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(operand[axis] for axis in contracted)
        assert eqn.primitive.name not in ("scan", "while")
        inner = (getattr(value, "jaxpr", value) for value in eqn.params.values())
        total += sum(_matmul_flops(jaxpr) for jaxpr in inner if hasattr(jaxpr, "eqns"))
    return total


@pytest.mark.parametrize("fuse_blocks", [False, True])
@pytest.mark.parametrize(("cls_token", "predict_ratio"), [("learned", 1.0), ("learned", 0.34), ("none", 0.34)])
def test_cross_decoder_is_counted_to_the_last_matmul(fuse_blocks, cls_token, predict_ratio):
    """The model's own program is traced."""
    decoder = {"model__decoder_embed_dim": 32, "model__decoder_depth": 2, "model__decoder_mlp_ratio": 3.0}
    cross = {"model__decoder": "cross", "model__fuse_blocks": fuse_blocks, "model__predict_ratio": predict_ratio}
    tokens = {"model__cls_token": cls_token, "model__cls_tokens": 3 if cls_token == "learned" else 1}
    config = smoke_config(**SMALL, **decoder, **cross, **tokens)
    model = functional(functools.partial(make_model, config, 0, PLAIN))

    def forward(params, images, keys):
        bound = model.bind(params)
        return bound.removed_patches(images, *bound.draw_ids_shuffle(keys), keys)

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    traced = jax.make_jaxpr(forward)(model.abstract, jax.ShapeDtypeStruct((1, 32, 24, 3), jnp.float32), keys)
    counted = flops.train_flops_per_image(config, 0, flops.count_kept_patches(config), 3)
    assert counted / 3 == _matmul_flops(traced.jaxpr)


def test_vit_base_is_17_5_giga_multiply_adds():
    config = get_config("imagenet_vit_b16")
    config.model.cls_token = "learned"
    head = 2 * 768 * 1000
    assert flops.forward_flops(config) + head == pytest.approx(2 * 17.56e9, rel=1e-3)


def test_an_encoder_costs_what_runs_of_it():
    """Frozen its forward pass only, and nothing where its features are cached."""
    probe = {"task": "probe", "init_from": "x", "classify__head": "mlp", "classify__hidden_dim": 16}
    config = smoke_config(**SMALL, **probe, model__cls_token="none")
    cached, frozen, trained = (flops.train_flops_per_image(config, 10, 24, passes) for passes in (0, 1, 3))
    assert cached == 3 * 2 * (48 * 16 + 16 * 10)
    assert trained - cached == pytest.approx(3 * (frozen - cached))


def test_masking_three_quarters_saves_most_of_the_encoder():
    decoder = {"model__decoder_embed_dim": 8, "model__decoder_depth": 1, "model__decoder_mlp_ratio": 4.0}
    config = smoke_config(**SMALL, **decoder, model__cls_token="none")

    def count(num_keep: int) -> float:
        return flops.train_flops_per_image(config, 0, num_keep, 3)

    assert count(6) < 0.35 * count(24)


@pytest.mark.parametrize(
    ("device_kind", "dtype", "tera"),
    [
        ("TPU v2", "bfloat16", 23),
        ("TPU v3", "bfloat16", 61.5),
        ("TPU v4", "bfloat16", 275),
        ("TPU v5 lite", "bfloat16", 197),
        ("TPU v5", "bfloat16", 459),
        ("TPU7x", "bfloat16", 1153.5),  # one of the two devices of a chip
        ("TPU v5p", "bfloat16", 459),
        ("TPU v6 lite", "bfloat16", 918),
        ("TPU v4", "float32", None),
        ("TPU v99", "bfloat16", None),
        ("Tesla V100-SXM2-16GB", "float16", 125),
        ("Tesla V100-SXM2-16GB", "bfloat16", None),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100 80GB PCIe", "float32", 156),
        ("NVIDIA A1000", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H100 of another make", "bfloat16", None),
        ("NVIDIA H200", "bfloat16", 989),
        ("NVIDIA H200 NVL", "bfloat16", 835),
        ("NVIDIA B200", "bfloat16", 2250),
        ("cpu", "float32", None),
    ],
)
def test_peak_of_known_devices_and_none_of_others(device_kind: str, dtype: str, tera: float | None):
    assert hardware.peak_flops(device_kind, dtype) == (None if tera is None else tera * 1e12)
