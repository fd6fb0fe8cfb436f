"""Folded parameters compute what the parameters do, and their gradient finds its way back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_dist.cpu import folding
from mae_dist.model.build import abstract_params
from mae_dist.model.hooks import PLAIN
from mae_dist.tasks.make import make_task
from tests import QUICK
from tests.runs import smoke_config
from tests.trained import in_memory

VARIANTS = {
    "LayerScale": {"model__layer_scale_init": 0.1},
    "no LayerScale, one block": {"model__depth": 1, "model__decoder_depth": 1},
    "no bias of q, k and v": {"model__layer_scale_init": 0.1, "model__qkv_bias": False},
    "scanned, no class token": {"model__scan": True, "model__cls_token": "none", "model__layer_scale_init": 0.1},
    "cross": {"model__decoder": "cross", "model__layer_scale_init": 0.1, "model__predict_ratio": 0.5},
    "cross, all blocks": {"model__decoder": "cross", "model__fuse_blocks": True, "model__decoder_depth": 2},
    "fine-tuning, stochastic": {
        "task": "finetune",
        "model__drop_path": 0.3,
        "model__layer_scale_init": 0.1,
        "classify__norm_after_pool": True,
        "classify__pool": "gap",
    },
    "fine-tuning, MLP": {"task": "finetune", "classify__head": "mlp"},
}


def names(tree: Any) -> set[str]:
    return {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_computes_the_same(variant):
    """Loss and gradients, of random parameters: scales of one and biases of zero would hide their being left out."""
    source = in_memory(**VARIANTS[variant])
    task = make_task(source.config, 10, PLAIN)
    params = jax.tree.map(jnp.asarray, source.load_whole())
    size = source.config.model.image_size
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.integers(0, 256, (4, *size, source.config.model.channels)), jnp.uint8),
        "label": jnp.arange(4, dtype=jnp.int32),
    }
    keys = jax.random.split(jax.random.key(1), 4)

    def plain(params: Any) -> jax.Array:
        return task.loss(params, batch, keys)[0].mean()

    def folded(params: Any) -> Any:
        weights, pull_back = jax.vjp(folding.fold, params)
        loss, grads = jax.value_and_grad(lambda x: plain(folding.unfold(x, params)))(weights)
        return loss, pull_back(grads)[0]

    (a, da), (b, db) = (jax.jit(f, compiler_options=QUICK)(params) for f in (jax.value_and_grad(plain), folded))
    np.testing.assert_allclose(b, a, rtol=1e-5)
    assert names(da) == names(db) == names(params)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(da), jax.tree.leaves(db), strict=True):
        scale = float(jnp.abs(x).max())
        np.testing.assert_allclose(y, x, rtol=1e-3, atol=2e-5 * scale + 1e-9, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(("qkv_bias", "left"), [(True, set()), (False, {"norm1"})])
def test_what_is_left(qkv_bias, left):
    """Nothing that acts on tokens stays but what has nowhere to go; a block's arrays are on their own."""
    config = smoke_config(model__layer_scale_init=0.1, model__qkv_bias=qkv_bias)
    abstract = abstract_params(config, 10)
    folded = jax.eval_shape(folding.fold, abstract)
    for group, depth in (("encoder", config.model.depth), ("decoder", config.model.decoder_depth)):
        blocks = folded[group]["stack"]["blocks"]
        assert set(blocks) == {"attn", "mlp"} | left
        assert all(leaf.shape[0] == 1 for leaf in jax.tree.leaves(blocks))
        assert len(blocks["mlp"]["fc1"]["kernel"]) == depth
    assert "norm" in folded["encoder"]  # the decoder and whoever wants features take it
    assert "norm" not in folded["decoder"]
    restored = jax.eval_shape(lambda x: folding.unfold(x, abstract), folded)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), restored) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
