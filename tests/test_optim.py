"""The optimiser against AdamW written out in NumPy, the schedule against its formula, and the non-finite guard."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mae_dist.model.build import abstract_params
from mae_dist.model.parameters import HEAD, Parameter, parameter_rows
from mae_dist.optim.hyperparams import make_hyperparams
from mae_dist.optim.optimizer import make_optimizer, nonfinite_counts
from tests import NO_PARITY, QUICK
from tests.runs import smoke_config

# A matrix, stacks of matrices and of vectors, a norm, tokens and positions.
AXES: dict[str, Any] = {
    "kernel": ("embed", "mlp"),
    "blocks": {
        "kernel": ("layers", "embed", "mlp"),
        "bias": ("layers", None),
        "scale1": ("layers", None),
        "qkv": {"bias": ("layers", None, "heads", None)},
    },
    "norm": (None,),
    "cls_token": (None, None, None),
    "positions": (None, "embed"),
}
SHAPES: dict[str, Any] = {
    "kernel": (3, 4),
    "blocks": {"kernel": (2, 3, 4), "bias": (2, 4), "scale1": (2, 4), "qkv": {"bias": (2, 3, 2, 2)}},
    "norm": (3,),
    "cls_token": (1, 1, 3),
    "positions": (5, 3),
}
DECAYED = {
    "kernel": 1,
    "blocks": {"kernel": 1, "bias": 0, "scale1": 0, "qkv": {"bias": 0}},
    "norm": 0,
    "cls_token": 1,
    "positions": 1,
}
ROWS = jax.tree.map(
    lambda axes, decays: Parameter("", axes, bool(decays), HEAD), AXES, DECAYED, is_leaf=lambda x: isinstance(x, tuple)
)
OPTIONS: dict[str, Any] = {
    "name": "adamw",
    "b1": 0.9,
    "b2": 0.95,
    "eps": 1e-8,
    "momentum": 0.9,
    "trust_coefficient": 0.001,
    "layer_decay": 1.0,
    "weight_decay": 0.05,
    "clip_norm": 0.0,
    "clip_value": 0.0,
}
RATES: dict[str, Any] = {
    "schedule": "cosine",
    "base_lr": 0.1,
    "final_lr": 0.01,
    "warmup_steps": 3,
    "total_steps": 10,
    "global_batch_size": 128,
}


def random_tree(seed: int) -> Any:
    rng = np.random.default_rng(seed)

    def values(shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return jax.tree.map(values, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def make(**changes: Any) -> tuple[Any, Any]:
    """(init, compiled update (grads, state, params) -> (updates, state)) with the fields of OPTIONS and RATES."""
    rates = {name: changes.pop(name, value) for name, value in RATES.items()}
    tx, numbers = make_optimizer(ROWS, **{**OPTIONS, **changes}), make_hyperparams(seed=0, **rates)

    def update(grads: Any, state: Any, params: Any) -> Any:
        learning_rate = numbers.learning_rate(state[1].count)
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(grads, state, params, learning_rate=learning_rate)

    return tx.init, jax.jit(update, compiler_options=QUICK)


def expected_lr(step: int, warmup: int, total: int) -> float:
    """Linear warm-up to base_lr * batch / 256, then half a cosine to final_lr."""
    peak = 0.1 * 128 / 256
    if step < warmup:
        return peak * step / warmup
    progress = min(1, (step - warmup) / (total - warmup))
    return 0.01 + (peak - 0.01) * 0.5 * (1 + math.cos(math.pi * progress))


def optax_schedule(*, schedule, base_lr, final_lr, warmup_steps, total_steps, global_batch_size) -> optax.Schedule:
    """The same rates by Optax's own schedules, which want their numbers when they are made."""
    peak = base_lr * global_batch_size / 256
    after = optax.constant_schedule(peak)
    if schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(1, total_steps - warmup_steps), alpha=final_lr / peak)
    if warmup_steps == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), after], [warmup_steps])


@pytest.mark.parametrize("warmup", [0, 20])
def test_schedule(warmup):
    """0 at the start, the peak at the end of the warm-up, the final rate at and after the end."""
    numbers = make_hyperparams(seed=0, **{**RATES, "warmup_steps": warmup, "total_steps": 120})
    for step in (0, 1, 10, 19, 20, 21, 70, 119, 120, 500):
        found = float(numbers.learning_rate(jnp.int32(step)))
        assert found == pytest.approx(expected_lr(step, warmup, 120), rel=1e-5), step


@pytest.mark.parametrize("final_lr", [0.0, 1e-4, 0.1])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 130), (1, 90), (37, 200), (50, 50)])
def test_rates_are_those_of_optax(schedule, final_lr, warmup, total):
    """At every step and beyond the last; all warm-up too, which must not divide by zero."""
    fields = {"schedule": schedule, "base_lr": 1.5e-3, "final_lr": final_lr, "global_batch_size": 4096}
    fields |= {"warmup_steps": warmup, "total_steps": total}
    steps = jnp.arange(total + 20, dtype=jnp.int32)
    with jax.numpy_dtype_promotion("standard"):
        wanted = np.broadcast_to(optax_schedule(**fields)(steps), steps.shape)
    found = jax.jit(lambda numbers: numbers.learning_rate(steps))(make_hyperparams(seed=0, **fields))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(np.broadcast_to(found, steps.shape), wanted, rtol=5e-7, atol=2e-7 * wanted.max())


@pytest.mark.parametrize("batch", [64, 256, 4096])
def test_peak_grows_with_the_batch(batch):
    """lr = base_lr * global_batch_size / 256."""
    fields = {**RATES, "global_batch_size": batch, "schedule": "constant", "warmup_steps": 4, "total_steps": 100}
    numbers = make_hyperparams(seed=0, **fields)
    assert float(numbers.learning_rate(jnp.int32(2))) == pytest.approx(0.1 * batch / 256 / 2)
    for step in (4, 50, 1000):
        assert float(numbers.learning_rate(jnp.int32(step))) == pytest.approx(0.1 * batch / 256)


def test_decay_touches_only_what_its_rows_name():
    """Decay is a part of its own beside the gradient's."""
    params, zero = random_tree(0), jax.tree.map(jnp.zeros_like, random_tree(0))
    init, update = make(schedule="constant", warmup_steps=0)
    updates, _ = update(zero, init(params), params)
    jax.tree.map(
        lambda u, p, decayed: np.testing.assert_allclose(u, -0.05 * 0.05 * decayed * p, rtol=1e-6),
        updates,
        params,
        DECAYED,
    )


def test_adamw_of_ten_steps():
    """Bias correction, decay outside the moments, and the schedule read before it moves on."""
    init, update = make()
    params = random_tree(0)
    state = init(params)
    exact = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(params)]
    first, second = [np.zeros_like(p) for p in exact], [np.zeros_like(p) for p in exact]
    decays = jax.tree.leaves(DECAYED)
    for step in range(10):
        grads = random_tree(step + 1)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for i, grad in enumerate(np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(grads)):
            first[i] = 0.9 * first[i] + 0.1 * grad
            second[i] = 0.95 * second[i] + 0.05 * grad**2
            adam = first[i] / (1 - 0.9 ** (step + 1)) / (np.sqrt(second[i] / (1 - 0.95 ** (step + 1))) + 1e-8)
            exact[i] = exact[i] - expected_lr(step, 3, 10) * (adam + 0.05 * decays[i] * exact[i])
    for ours, theirs in zip(jax.tree.leaves(params), exact, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_sgd_is_that_of_pytorch(weight_decay, clip_norm):
    """Three steps with momentum; decay is part of the gradient, after clipping, and biases and norms have none."""
    torch = pytest.importorskip("torch", reason=NO_PARITY)
    init, update = make(name="sgd", weight_decay=weight_decay, clip_norm=clip_norm, schedule="constant", warmup_steps=0)
    params = random_tree(0)
    theirs = [torch.nn.Parameter(torch.tensor(np.array(leaf))) for leaf in jax.tree.leaves(params)]
    decays = [weight_decay * decayed for decayed in jax.tree.leaves(DECAYED)]
    groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(theirs, decays, strict=True)]
    there = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    state = init(params)
    assert isinstance(state[0].inner_state[int(clip_norm > 0)], optax.TraceState), "where older checkpoints have it"
    for seed in (1, 2, 3):
        grads = random_tree(seed)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for p, grad in zip(theirs, jax.tree.leaves(grads), strict=True):
            p.grad = torch.tensor(np.array(grad))
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(theirs, clip_norm)
        there.step()
    for ours, p in zip(jax.tree.leaves(params), theirs, strict=True):
        np.testing.assert_allclose(ours, p.detach().numpy(), rtol=1e-5, atol=1e-6)


def sgd_step(grads: Any, **clip: float) -> Any:
    """The gradient as it comes out of clipping."""
    init, update = make(name="sgd", momentum=0.0, weight_decay=0.0, schedule="constant", warmup_steps=0, **clip)
    updates, _ = update(grads, init(grads), grads)
    return jax.tree.map(lambda u: u / jnp.float32(-0.05), updates)


def test_clip_by_global_norm():
    """One factor for all parameters, and none below the limit."""
    grads = random_tree(1)
    norm = np.sqrt(sum((np.asarray(leaf, np.float64) ** 2).sum() for leaf in jax.tree.leaves(grads)))
    for limit, factor in ((norm / 4, 0.25), (norm * 2, 1.0)):
        clipped = sgd_step(grads, clip_norm=limit)
        jax.tree.map(lambda c, g, f=factor: np.testing.assert_allclose(c, g * f, rtol=1e-5), clipped, grads)


def test_clip_by_value():
    """Every component by itself."""
    grads = random_tree(1)
    clipped = sgd_step(grads, clip_value=0.5)
    jax.tree.map(lambda c, g: np.testing.assert_allclose(c, np.clip(g, -0.5, 0.5), rtol=1e-6), clipped, grads)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_gradient_changes_nothing_and_is_counted(bad):
    """One NaN would otherwise stay in the moments for ever."""
    init, update = make(clip_norm=1.0, clip_value=3.0)
    params = random_tree(0)
    good = random_tree(1)
    broken = {**good, "norm": good["norm"].at[1].set(bad)}
    _, state = update(good, init(params), params)

    counts = []
    for grads in (broken, broken, good, broken):
        updates, after = update(grads, state, params)
        if grads is broken:
            assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates))
            jax.tree.map(np.testing.assert_array_equal, after[0].inner_state, state[0].inner_state)
        else:
            assert all((leaf != 0).any() for leaf in jax.tree.leaves(updates))
        state = after
        counts.append(tuple(int(count) for count in nonfinite_counts(state)))
    assert counts == [(1, 1), (2, 2), (0, 2), (1, 3)]


def test_a_gradient_without_a_finite_norm_is_skipped():
    """Each number is finite and the sum of their squares is not, in float32."""
    init, update = make(warmup_steps=0)
    params = random_tree(0)
    updates, state = update(jax.tree.map(lambda p: jnp.full_like(p, 1e20), params), init(params), params)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates))
    assert tuple(int(count) for count in nonfinite_counts(state)) == (1, 1)


def test_schedule_follows_the_step_number_over_skipped_steps():
    """Otherwise the rate that is logged and the rate that is used would part after the first skip."""
    init, update = make(name="sgd", momentum=0.0, weight_decay=0.0)
    good = random_tree(1)
    broken = {**good, "norm": good["norm"] * jnp.nan}
    state = init(good)
    for step, grads in enumerate((good, good, broken, broken, good, good)):
        updates, state = update(grads, state, good)
        lr = 0.0 if grads is broken else expected_lr(step, 3, 10)
        np.testing.assert_allclose(updates["kernel"], -lr * good["kernel"], rtol=1e-5)


def lars_reference(params: Any, grads: list[Any], weight_decay: float) -> Any:
    """LARS as the linear probe of the paper's code describes it, array by array and block by block, in float64."""

    def steps(param: np.ndarray, updates: list[np.ndarray], decayed: int) -> np.ndarray:
        velocity = np.zeros_like(param)
        for grad in updates:
            if decayed:
                grad = grad + weight_decay * param
                grad = grad * 0.001 * np.linalg.norm(param) / np.linalg.norm(grad)
            velocity = 0.9 * velocity + grad
            param = param - 0.05 * velocity
        return param

    def leaf(axes: Any, decayed: int, param: Any, *updates: Any) -> np.ndarray:
        param, *grads = (np.asarray(x, np.float64) for x in (param, *updates))
        if "layers" in axes:
            return np.stack([steps(p, g, decayed) for p, *g in zip(param, *grads, strict=True)])
        return steps(param, grads, decayed)

    return jax.tree.map(leaf, AXES, DECAYED, params, *grads, is_leaf=lambda x: isinstance(x, tuple))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lars(weight_decay):
    """A trust ratio for each matrix and each block's matrix, none for vectors; momentum after it."""
    options: dict[str, Any] = {"name": "lars", "schedule": "constant", "warmup_steps": 0, "weight_decay": weight_decay}
    init, update = make(**options)
    params, grads = random_tree(0), [random_tree(seed) for seed in (1, 2, 3)]
    params["blocks"]["kernel"] *= jnp.array([1.0, 30.0])[:, None, None]  # one ratio for both would be far off
    expected = lars_reference(params, grads, weight_decay)
    state = init(params)
    for grad in grads:
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda p, e: np.testing.assert_allclose(p, e, rtol=1e-5, atol=1e-6), params, expected)


def test_lars_of_zero_parameters_moves_them():
    """A new linear layer may start at zero; a ratio of zero would keep it there for ever."""
    init, update = make(name="lars", schedule="constant", warmup_steps=0, weight_decay=0.0)
    zero, grads = jax.tree.map(jnp.zeros_like, random_tree(0)), random_tree(1)
    updates, _ = update(grads, init(zero), zero)
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, -0.05 * g, rtol=1e-6), updates, grads)


def test_lars_of_sharded_parameters():
    """The norm is that of the whole matrix, not of the part that a device holds."""
    options: dict[str, Any] = {"name": "lars", "schedule": "constant", "warmup_steps": 0}
    init, update = make(**options)
    params, grads = random_tree(0), random_tree(1)
    whole, _ = update(grads, init(params), params)
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "x"))
    for tree in (params, grads):
        tree["blocks"]["kernel"] = jax.device_put(tree["blocks"]["kernel"], split)  # (2, 3, 4) -> (2, 3, 2) each
    state = init(params)
    assert state[0].inner_state[-1].trace["blocks"]["kernel"].sharding == split
    parts, _ = update(grads, state, params)
    np.testing.assert_allclose(parts["blocks"]["kernel"], whole["blocks"]["kernel"], rtol=1e-6)


def test_layer_decay():
    """Each parameter's step against the same optimiser without it, block by block from the formula."""
    params = abstract_params(smoke_config(task="finetune", model__depth=3, model__pos_embed="learned"), 5)
    rows = parameter_rows(params)
    rng = np.random.default_rng(0)
    params, grads = (
        jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params) for _ in range(2)
    )

    def step(layer_decay: float) -> Any:
        tx, lr = make_optimizer(rows, **{**OPTIONS, "layer_decay": layer_decay}), jnp.float32(0.05)
        with jax.numpy_dtype_promotion("standard"):
            return jax.jit(
                lambda: tx.update(grads, tx.init(params), params, learning_rate=lr)[0], compiler_options=QUICK
            )()

    plain, scaled = step(1.0), step(0.5)
    found = jax.tree.map(lambda s, p: np.asarray(s, np.float64) / np.asarray(p, np.float64), scaled, plain)
    encoder = found["encoder"]
    for name, expected in (("patch_embed", 0.5**4), ("cls_token", 0.5**4), ("positions", 0.5**4), ("norm", 1.0)):
        for ratio in jax.tree.leaves(encoder[name]):
            np.testing.assert_allclose(ratio, expected, rtol=1e-5, err_msg=name)
    for block, expected in enumerate((0.5**3, 0.5**2, 0.5)):
        for ratio in jax.tree.leaves(encoder["stack"]):
            np.testing.assert_allclose(ratio[block], expected, rtol=1e-5)
    for ratio in jax.tree.leaves(found["head"]):
        np.testing.assert_allclose(ratio, 1.0)
