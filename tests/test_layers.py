"""Transformer layers: regularisation per example, and one result whatever the scan and rematerialisation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mae_dist import layers
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
MANY = jax.random.split(jax.random.key(2), 4000)


def make_stack(*, scan: bool = False, remat: str = "none", drop_path: float = 0.0, dropout: float = 0.0):
    return layers.Stack(
        DIM,
        depth=2,
        drop_path=drop_path,
        dropout=dropout,
        scan=scan,
        remat=remat,
        constrain=layers.unconstrained,
        rngs=nnx.Rngs(0),
        **BLOCK,
    )


def test_no_keys_means_no_dropout():
    """Evaluation must be deterministic: None turns everything random off."""
    assert layers.fold_in(None, 3) is None
    assert layers.dropout(X, 0.5, None) is X
    assert layers.drop_path(X, 0.5, None) is X


def test_dropout_zeroes_single_values_and_keeps_the_mean():
    """Without the scale by 1 / (1 - rate), training and evaluation would see different magnitudes."""
    out = np.asarray(layers.dropout(jnp.ones((4000, 7)), 0.3, MANY))
    assert set(np.unique(out)) == {0.0, np.float32(1 / np.float32(0.7))}
    assert abs((out == 0).mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / out.size)
    assert out.mean() == pytest.approx(1, abs=0.02)


def test_drop_path_drops_whole_examples_and_keeps_the_mean():
    """Stochastic depth removes a branch of one example, not of the batch and not single values."""
    out = np.asarray(layers.drop_path(jnp.ones((4000, 3, 2)), 0.4, MANY))
    per_example = out.reshape(4000, -1)
    assert (per_example == per_example[:, :1]).all()
    assert set(np.unique(out)) == {0.0, np.float32(1 / np.float32(0.6))}
    assert abs((per_example[:, 0] == 0).mean() - 0.4) < 5 * np.sqrt(0.4 * 0.6 / 4000)
    assert out.mean() == pytest.approx(1, abs=0.05)


def test_drop_path_of_rate_zero_changes_nothing():
    """The first block has rate 0."""
    np.testing.assert_array_equal(layers.drop_path(X, jnp.float32(0), KEYS), X)


@pytest.mark.parametrize("layer", [layers.dropout, layers.drop_path])
def test_an_example_has_its_own_dropout(layer):
    """An example's noise may depend on its key alone, so that it does not change with devices or accumulation."""
    out = np.asarray(layer(X, 0.5, KEYS))
    order = np.array([3, 0, 5, 1, 4, 2])
    np.testing.assert_array_equal(layer(X[order], 0.5, KEYS[order]), out[order])
    np.testing.assert_array_equal(layer(X, 0.5, KEYS), out)
    others = [np.asarray(layer(X, 0.5, layers.fold_in(KEYS, i))) for i in range(3)]
    assert any((out != other).any() for other in others)


def test_layer_norm_statistics_are_float32():
    """In bfloat16 the variance of values around 100 would be lost."""
    norm = nnx.LayerNorm(DIM, epsilon=1e-6, rngs=nnx.Rngs(0))
    x = jnp.asarray(100 + 4 * np.arange(DIM), jnp.bfloat16)[None]
    out = layers.layer_norm(norm, x)
    assert out.dtype == jnp.bfloat16
    exact = (np.arange(DIM) - 3.5) / np.std(np.arange(DIM))
    np.testing.assert_allclose(out[0].astype(jnp.float32), exact, atol=0.01)


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
