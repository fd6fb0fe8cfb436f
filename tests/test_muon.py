"""Muon against its iteration written out in NumPy, matrix by matrix, and on sharded meshes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_dist.model.build import abstract_params
from mae_dist.model.parameters import PARAMETERS, parameter_rows, path_name
from mae_dist.optim.muon import orthogonalisation_flops
from mae_dist.optim.optimizer import make_optimizer
from tests import QUICK
from tests.runs import losses, smoke_config
from tests.test_optim import OPTIONS

STEPS = 3
RATE, DECAY, MOMENTUM, B1, B2 = 0.02, 0.05, 0.95, 0.9, 0.95


def orthogonalised(x: np.ndarray) -> np.ndarray:
    """Five Newton-Schulz iterations (Jordan et al. 2024) of a matrix (m, k)."""
    if x.shape[0] > x.shape[1]:
        return orthogonalised(x.T).T
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def direction_of_muon(path: str, momentum: np.ndarray) -> np.ndarray:
    """Orthogonalises each matrix of a stack by itself, as the name of its layer says."""
    result = np.empty_like(momentum)
    for block, matrix in enumerate(momentum):
        if path.endswith(("qkv/kernel", "kv/kernel")):  # (D, 3 or 2, H, hd)
            for part in range(matrix.shape[1]):
                flat = matrix[:, part].reshape(len(matrix), -1)
                scale = 0.2 * np.sqrt(max(flat.shape))
                result[block][:, part] = scale * orthogonalised(flat).reshape(matrix[:, part].shape)
            continue
        outputs = matrix.shape[-1] if path.endswith(("out/kernel", "fc1/kernel", "fc2/kernel")) else None
        flat = matrix.reshape(-1, outputs) if outputs else matrix.reshape(len(matrix), -1)  # q: (D, H, hd)
        result[block] = 0.2 * np.sqrt(max(flat.shape)) * orthogonalised(flat).reshape(matrix.shape)
    return result


def reference(path: str, param: np.ndarray, grads: list[np.ndarray]) -> np.ndarray:
    """Returns the parameter after these gradients, in float64."""
    param, first, second = param.astype(np.float64), 0.0, 0.0
    decays = PARAMETERS[path].decays
    is_matrix = "/blocks/" in path and path.endswith("kernel")
    for step, grad in enumerate(grads, start=1):
        grad = grad.astype(np.float64)
        if is_matrix:
            first = MOMENTUM * first + (1 - MOMENTUM) * grad
            ahead = MOMENTUM * first / (1 - MOMENTUM ** (step + 1)) + (1 - MOMENTUM) * grad / (1 - MOMENTUM**step)
            direction = direction_of_muon(path, ahead)
        else:
            first, second = B1 * first + (1 - B1) * grad, B2 * second + (1 - B2) * grad**2
            direction = first / (1 - B1**step) / (np.sqrt(second / (1 - B2**step)) + 1e-8)
        param = param - RATE * (direction + (DECAY * param if decays else 0))
    return param


@pytest.mark.parametrize("decoder", ["full", "cross"])
def test_each_matrix_has_its_own_iteration(decoder):
    """Three steps of every parameter of a model: blocks, and queries, keys and values, one by one."""
    shapes = abstract_params(smoke_config(model__depth=3, model__decoder=decoder, model__mlp_ratio=2.0), 0)
    rng = np.random.default_rng(0)

    def random() -> Any:
        return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)

    params, grads = random(), [random() for _ in range(STEPS)]
    options = {**OPTIONS, "name": "muon", "momentum": MOMENTUM, "b1": B1, "b2": B2, "weight_decay": DECAY}
    tx = make_optimizer(parameter_rows(shapes), **options)

    def update(grad: Any, state: Any, params: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grad, state, params, learning_rate=jnp.float32(RATE))
        return jax.tree.map(jnp.add, params, updates), state

    compiled, state, found = jax.jit(update, compiler_options=QUICK), tx.init(params), params
    for grad in grads:
        found, state = compiled(grad, state, found)
    given = [jax.tree.leaves(grad) for grad in grads]
    for number, (path, param) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        expected = reference(path_name(path), np.asarray(param), [np.asarray(leaves[number]) for leaves in given])
        np.testing.assert_allclose(jax.tree.leaves(found)[number], expected, atol=2e-5, err_msg=path_name(path))


@pytest.mark.parametrize(
    ("shape", "shard_state"),
    [((2, 2, 2), False), ((8, 1, 1), True), pytest.param((4, 1, 2), True, marks=pytest.mark.long)],
)
def test_sharded_matrices(shape, shard_state):
    """The iteration is that of whole matrices, wherever their parts lie."""
    options = {"optim__name": "muon", "global_batch_size": 64, "total_steps": 20}
    expected, expected_state = losses(smoke_config(**options), 1)
    data, fsdp, tensor = shape
    mesh = {"mesh__data": data, "mesh__fsdp": fsdp, "mesh__tensor": tensor}
    found, state = losses(smoke_config(**options, **mesh, optim__shard_state=shard_state), 8)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        if path_name(path).endswith("kernel"):
            wanted = dict(jax.tree_util.tree_leaves_with_path(expected_state.params))[path]
            np.testing.assert_allclose(leaf, wanted, atol=1e-5, err_msg=path_name(path))


def test_flops_of_a_step():
    """Five times X X^T, its square and its product with X, for two blocks of (D, M) = (8, 24)."""
    row = PARAMETERS["encoder/stack/blocks/mlp/fc1/kernel"]
    assert orthogonalisation_flops(row, (2, 8, 24)) == 5 * 2 * (2 * 8 * 8 * 24 + 2 * 8 * 8 * 8 + 2 * 8 * 8 * 24)
    row = PARAMETERS["encoder/stack/blocks/attn/qkv/kernel"]
    assert orthogonalisation_flops(row, (1, 8, 3, 2, 4)) == 5 * 3 * 3 * 2 * 8**3
    assert orthogonalisation_flops(PARAMETERS["decoder/pred/kernel"], (8, 24)) == 0
