"""Transformer layers: one result whatever the scan and rematerialisation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mae_dist.model import layers
from mae_dist.model.hooks import PLAIN
from tests import QUICK

BATCH, TOKENS, DIM = 6, 5, 8
BLOCK: dict[str, Any] = {
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "qkv_bias": True,
    "gelu": "exact",
    "layer_scale_init": 0.5,
    "norm_eps": 1e-6,
    "dtype": jnp.float32,
}
X = jax.random.normal(jax.random.key(0), (BATCH, TOKENS, DIM))
KEYS = jax.random.split(jax.random.key(1), BATCH)


def make_stack(*, scan: bool = False, remat: str = "none", drop_path: float = 0.0, dropout: float = 0.0):
    return layers.Stack(
        DIM,
        depth=2,
        drop_path=drop_path,
        dropout=dropout,
        scan=scan,
        remat=remat,
        hooks=PLAIN,
        rngs=nnx.Rngs(0),
        **BLOCK,
    )


def run_stack(*, scan: bool, remat: str) -> tuple[jax.Array, Any, Any]:
    """Output, initial parameters and gradients of a stack with dropout and DropPath."""

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(x: jax.Array) -> tuple[jax.Array, Any, Any]:
        graphdef, params = nnx.split(make_stack(scan=scan, remat=remat, drop_path=0.4, dropout=0.2), nnx.Param)

        def loss(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = nnx.merge(graphdef, params)(x, KEYS)
            return jnp.sin(out).sum(), out

        (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return out, nnx.to_pure_dict(params), (nnx.to_pure_dict(grads[0]), grads[1])

    return run(X)


@pytest.fixture(scope="module")
def unrolled() -> Any:
    """The plain unrolled stack."""
    return run_stack(scan=False, remat="none")


@pytest.mark.parametrize(
    ("scan", "remat"), [(False, "blocks"), (False, "dots"), (True, "none"), (True, "blocks"), (True, "dots")]
)
def test_scan_and_remat_change_nothing(unrolled, scan, remat):
    """One checkpoint, one loss curve: how a stack is compiled is free to change between runs."""
    out, params, grads = run_stack(scan=scan, remat=remat)
    jax.tree.map(np.testing.assert_array_equal, params, unrolled[1])
    np.testing.assert_allclose(out, unrolled[0], atol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, unrolled[2])


def test_stack_is_deterministic_without_keys_and_random_with_them(unrolled):
    """And a stack without any dropout ignores the keys it is given."""

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run() -> tuple[jax.Array, ...]:
        plain, noisy = make_stack(), make_stack(drop_path=0.4, dropout=0.2)
        return plain(X, None), plain(X, KEYS), noisy(X, None)

    quiet, *others = run()
    for other in others:
        np.testing.assert_array_equal(other, quiet)
    assert np.abs(np.asarray(unrolled[0] - quiet)).max() > 0.1


def test_blocks_start_from_different_weights(unrolled):
    """A vmapped initialiser with one key would make every block the same."""
    kernel = np.asarray(unrolled[1]["blocks"]["mlp"]["fc1"]["kernel"])
    assert kernel.shape == (2, DIM, 2 * DIM)
    assert (kernel[0] != kernel[1]).all()


def test_kernels_are_xavier_uniform_over_all_inputs_and_outputs():
    """The paper's code: the bound of a fused q, k, v product counts all its outputs, of `out` all its inputs."""

    @functools.partial(jax.jit, compiler_options=QUICK)
    def init() -> Any:
        return nnx.to_pure_dict(nnx.state(layers.Block(64, **BLOCK, dropout=0.0, rngs=nnx.Rngs(0)), nnx.Param))

    params = init()
    for group, layer, fans in (
        ("attn", "qkv", 64 + 192),
        ("attn", "out", 64 + 64),
        ("mlp", "fc1", 64 + 128),
        ("mlp", "fc2", 128 + 64),
    ):
        bound = np.sqrt(6 / fans)
        assert 0.98 * bound < np.abs(params[group][layer]["kernel"]).max() <= bound * 1.0001
        assert (params[group][layer]["bias"] == 0).all()


@pytest.mark.parametrize("scan", [False, True])
def test_every_branch_of_every_block_has_its_own_dropout(scan):
    """One mask for all blocks would silence the same units from the bottom to the top."""

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run() -> jax.Array:
        graphdef, state = nnx.split(make_stack(scan=scan, dropout=0.5), nnx.Param)
        # Every branch gives ones, so that the output counts the branches that were kept, times 1 / (1 - 0.5).
        params = jax.tree_util.tree_map_with_path(
            lambda path, p: jnp.full_like(p, any(name in jax.tree_util.keystr(path) for name in ("bias", "scale"))),
            nnx.to_pure_dict(state),
        )
        for kernel in (params["blocks"]["attn"]["out"], params["blocks"]["mlp"]["fc2"]):
            kernel["kernel"] = jnp.zeros_like(kernel["kernel"])
        return nnx.merge(graphdef, params)(jnp.zeros_like(X), KEYS)

    values, counts = np.unique(np.asarray(run()), return_counts=True)
    assert values.tolist() == [0, 2, 4, 6, 8]
    np.testing.assert_allclose(counts / counts.sum(), np.array([1, 4, 6, 4, 1]) / 16, atol=0.12)
