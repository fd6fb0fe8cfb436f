"""Heads as they begin, and BatchNorm of the linear probe: PyTorch's numbers, over the whole batch of any devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mae_dist.data.from_config import open_data
from mae_dist.model import heads
from mae_dist.training import job
from tests import NO_PARITY
from tests.runs import compile_quickly, first_batch, smoke_config

PROBE: dict[str, Any] = {
    "task": "probe",
    "init_from": "unused",
    "global_batch_size": 32,
    "total_steps": 2,
    "model__depth": 1,
    "data__augment": "flip",
    "classify__batch_norm": True,
    "classify__pool": "cls",
    "optim__name": "lars",
    "optim__weight_decay": 0.0,
    "optim__warmup_epochs": 0.0,
    "ema_decay": 0.9,
}


@pytest.mark.parametrize("std", [0.01, 2e-5])
def test_initial_weights_have_the_deviation_that_is_asked_for(std):
    """As timm's `trunc_normal_`, whose bounds are no multiples of the deviation: it is normal, far tails included."""
    torch = pytest.importorskip("torch", reason=NO_PARITY)
    head = heads.Head(300, 300, kind="linear", hidden_dim=0, norm_eps=0.0, init_std=std, rngs=nnx.Rngs(0))
    ours = np.asarray(head.linear.kernel[...]) / std
    there = torch.nn.init.trunc_normal_(torch.empty(300, 300), std=std).numpy() / std
    for kernel in (ours, there):
        assert kernel.std() == pytest.approx(1, rel=0.02)
        assert np.abs(kernel).max() > 3


def test_batch_norm_is_that_of_pytorch():
    """Training on three batches, gradients included, then evaluation: unbiased variance in the running statistics."""
    torch = pytest.importorskip("torch", reason=NO_PARITY)
    rng = np.random.default_rng(0)
    theirs: Any = torch.nn.BatchNorm1d(5, eps=1e-6, affine=False)
    ours = heads.BatchNorm(5)
    for _ in range(3):
        x = (rng.normal(size=(6, 5)) * [1, 10, 0.1, 1, 1e-4] + [0, 5, 1, -3, 0]).astype(np.float32)
        weight = rng.normal(size=(6, 5)).astype(np.float32)
        there: Any = torch.tensor(x, requires_grad=True)
        out = theirs(there)
        (out * torch.tensor(weight)).sum().backward()
        np.testing.assert_allclose(ours(jnp.asarray(x), whole_batch=True), out.detach().numpy(), rtol=1e-4, atol=1e-4)
        grad = jax.grad(lambda v, w=weight, m=ours: (m(v, whole_batch=True) * w).sum())(jnp.asarray(x))
        np.testing.assert_allclose(grad, there.grad.numpy(), rtol=1e-3, atol=1e-3)
        ours.mean[...], ours.var[...] = (ours.updated(jnp.asarray(x))[name] for name in ("mean", "var"))
    np.testing.assert_allclose(ours.mean[...], theirs.running_mean.numpy(), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(ours.var[...], theirs.running_var.numpy(), rtol=1e-5)
    x = rng.normal(size=(2, 5)).astype(np.float32)
    expected = theirs.eval()(torch.tensor(x)).numpy()
    np.testing.assert_allclose(ours(jnp.asarray(x), whole_batch=False), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_statistics_are_of_the_whole_batch():
    """However it is computed; they are neither trained nor averaged over devices, and no optimizer knows of them."""

    def trained(num_devices: int, **options: Any) -> tuple[Any, Any, Any, list[Any], Any]:
        """(job, batch, compiled update, metrics of two updates, state after them)."""
        built = job.build(smoke_config(**PROBE, **options), jax.devices()[:num_devices], data)
        batch, metrics = first_batch(built), [{}, {}]
        init, update = compile_quickly(built, batch)
        with jax.set_mesh(built.mesh):
            state = init()
            for i in range(2):
                state, metrics[i] = update(state, batch)
        return built, batch, update, metrics, state

    data = open_data(smoke_config(**PROBE))
    built, batch, update, metrics, state = trained(1, cpu__pieces=1)
    assert set(state.ema) == {"head"}
    assert not [path for path, _ in jax.tree.leaves_with_path(state.opt_state) if "batch_norm" in str(path)]
    statistics = state.params["batch_norm"]
    for num_devices, options in (
        (4, {"mesh__data": 4, "accum_steps": 2, "cpu__pieces": 4}),
        (4, {"mesh__data": 2, "mesh__fsdp": 2, "accum_steps": 4, "cpu__pieces": 1}),
    ):
        *_, others, other = trained(num_devices, **options)
        for a, b in zip(metrics, others, strict=True):
            np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
            np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-4)
        for name, value in other.params["batch_norm"].items():
            np.testing.assert_allclose(value, statistics[name], rtol=1e-4, atol=1e-6)

    # One more update from features instead of images: the same head code, and the statistics by their formula.
    with jax.set_mesh(built.mesh):
        features = built.feature_step(state.params, batch)
        x, before = np.asarray(features, np.float64), jax.tree.map(np.array, statistics)
        cached = {"features": features, "label": batch["label"]}
        again = jax.tree.map(jnp.copy, state)
        from_images, from_features = update(state, batch), built.train_step(again, cached)
    for a, b in zip(jax.tree.leaves(from_images), jax.tree.leaves(from_features), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    after = from_images[0].params["batch_norm"]
    np.testing.assert_allclose(after["mean"], 0.9 * before["mean"] + 0.1 * x.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(after["var"], 0.9 * before["var"] + 0.1 * x.var(0, ddof=1), rtol=1e-5, atol=1e-7)

    # An update that is skipped leaves them; evaluation uses them as they are.
    with jax.set_mesh(built.mesh):
        kept = jax.tree.map(np.array, after)
        broken, metrics = built.train_step(from_images[0], {**cached, "features": features * jnp.nan})
    assert int(metrics["skipped_run"]) == 1
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, broken.params["batch_norm"]), kept)
    batch = {**batch, "weight": jnp.ones(32), "index": jnp.arange(32)}
    found = jax.device_get(built.eval_step(broken.params, batch))["loss"].compute()
    kernel, bias = (np.asarray(broken.params["head"]["linear"][name], np.float64) for name in ("kernel", "bias"))
    logits = (x - kept["mean"]) / np.sqrt(kept["var"] + 1e-6) @ kernel + bias
    picked = logits[np.arange(32), np.asarray(batch["label"])]
    np.testing.assert_allclose(found, (np.log(np.exp(logits).sum(1)) - picked).mean(), rtol=1e-4)
