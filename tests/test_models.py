"""The whole model against the float64 reference, value and gradient, and what it must never look at."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import cifar_medium, cifar_small
from mae_dist.model import autoencoder, patches
from mae_dist.model.build import param_count
from mae_dist.model.classifier import Classifier
from mae_dist.model.hooks import PLAIN
from mae_dist.model.parameters import path_name
from mae_dist.tasks import losses
from mae_dist.tasks.make import make_task
from tests import QUICK, reference
from tests.runs import smoke_config

BATCH = 3
# The paper's options in the smallest size that still has several of everything.
BASE: dict[str, Any] = {
    "image_size": (12, 12),
    "channels": 3,
    "patch_size": (3, 3),
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "decoder_embed_dim": 12,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "decoder_mlp_ratio": 3.0,
    "decoder": "full",
    "predict_ratio": 1.0,
    "fuse_blocks": False,
    "mask_ratio": 0.75,
    "masking": "random",
    "mask_file": "",
    "mask_block": 1,
    "cls_token": "learned",
    "cls_tokens": 1,
    "mask_token": "learned",
    "pos_embed": "sincos2d",
    "layer_scale_init": 0.0,
    "norm_eps": 1e-6,
    "drop_path": 0.0,
    "dropout": 0.0,
    "qkv_bias": True,
    "gelu": "exact",
    "dtype": "float32",
    "scan": False,
    "remat": "none",
}
NOT_SQUARE = {"image_size": (8, 12), "patch_size": (4, 2)}
VARIANTS: dict[str, tuple[dict[str, Any], bool]] = {  # changes to BASE, norm_pix_loss
    "paper": ({}, True),
    "report": (
        {
            **NOT_SQUARE,
            "channels": 1,
            "pos_embed": "sincos1d",
            "layer_scale_init": 0.1,
            "gelu": "tanh",
            "cls_token": "zero",
            "mask_token": "zero",
            "masking": "block",
        },
        False,
    ),
    "no cls, learned positions, grid": (
        {"cls_token": "none", "pos_embed": "learned", "qkv_bias": False, "masking": "grid", "mask_ratio": 0.5},
        True,
    ),
    "four class tokens, squares": ({"cls_tokens": 4, "mask_block": 2}, True),
    "cross": ({"decoder": "cross", "decoder_depth": 2, "cls_tokens": 3}, True),
    "cross, no cls, grid": (
        {
            **{"decoder": "cross", "cls_token": "none", "mask_token": "zero", "pos_embed": "learned"},
            **{"qkv_bias": False, "layer_scale_init": 0.1, "masking": "grid", "mask_ratio": 0.5},
        },
        False,
    ),
    "cross, all blocks, scanned": (
        {**NOT_SQUARE, "decoder": "cross", "fuse_blocks": True, "scan": True, "depth": 3, "decoder_depth": 2},
        True,
    ),
    "user mask, scanned": ({**NOT_SQUARE, "masking": "user", "scan": True, "depth": 3, "decoder_depth": 2}, False),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One variant with its weights, a batch, and the compiled forward and backward pass."""

    config: dict[str, Any]
    norm_pix_loss: bool
    params: Any
    images: np.ndarray
    ids_shuffle: jax.Array
    kept: int
    run: Callable[..., Any]  # (params, images) -> ((loss, (latent, pred, mask, per_example)), gradients)

    @property
    def options(self) -> reference.Options:
        names = ("patch_size", "cls_token", "pos_embed", "gelu")
        return reference.Options(**{name: self.config[name] for name in names}, norm_pix_loss=self.norm_pix_loss)

    def reference(self, params: Any) -> reference.Output:
        return reference.autoencoder(params, self.images, np.asarray(self.ids_shuffle), self.kept, self.options)


def abstract_params(make: Callable[[], nnx.Module]) -> tuple[Any, dict[str, Any]]:
    """(graphdef, shapes of the parameters), with nothing computed."""
    graphdef, shapes = nnx.split(nnx.eval_shape(make), nnx.Param)
    return graphdef, nnx.to_pure_dict(shapes)


def make_params(config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Random values everywhere: biases of zero and scales of one would hide their being left out."""
    graphdef, shapes = abstract_params(lambda: autoencoder.MaskedAutoencoder(**config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)

    def values(path: Any, leaf: Any) -> jax.Array:
        mean = 1 if "scale" in path_name(path) else 0
        return jnp.asarray(rng.normal(mean, 0.25, leaf.shape), jnp.float32)

    return graphdef, jax.tree_util.tree_map_with_path(values, shapes)


@functools.cache
def make_case(variant: str, dtype: str = "float32", mask_file: str = "") -> Case:
    """Compiles a variant."""
    changes, norm_pix_loss = VARIANTS[variant]
    config = {**BASE, **changes, "dtype": dtype, "mask_file": mask_file}
    graphdef, params = make_params(config)
    rng = np.random.default_rng(2)
    images = rng.uniform(size=(BATCH, *config["image_size"], config["channels"])).astype(np.float32)
    keys = jax.random.split(jax.random.key(3), BATCH)
    kept = 0

    @functools.partial(jax.jit, compiler_options=QUICK)
    def draw() -> jax.Array:
        nonlocal kept
        ids_shuffle, kept = nnx.merge(graphdef, params).draw_ids_shuffle(keys)
        return ids_shuffle

    ids_shuffle = draw()

    def loss(params: Any, images: jax.Array) -> Any:
        model = nnx.merge(graphdef, params)
        pred, true, mask = model(images, ids_shuffle, kept, None)
        latent = model.encoder(patches.patchify(images, config["patch_size"]), ids_shuffle[:, :kept], None)
        target = losses.normalize_patches(true) if norm_pix_loss else true
        per_example = losses.masked_pixel_loss(pred, target, mask)
        return per_example.mean(), (latent, pred, mask, per_example)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
    return Case(config, norm_pix_loss, params, images, ids_shuffle, kept, run)


@pytest.fixture(scope="module", params=list(VARIANTS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Each variant in turn."""
    if "user" not in request.param:
        return make_case(request.param)
    path: Path = tmp_path_factory.mktemp("mask") / "mask.npy"
    np.save(path, np.array([[0, 1, 1, 0, 1, 1], [1, 1, 0, 1, 1, 0]]))
    return make_case(request.param, mask_file=str(path))


def near(actual: jax.Array, expected: np.ndarray, rel: float = 1e-5) -> None:
    """Within `rel` of the largest expected value."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rel * np.abs(expected).max())


def test_forward_is_the_papers(case: Case):
    """Every equation at once: a transposed kernel, a wrong position or a wrong restore shows here."""
    (loss, (latent, pred, mask, per_example)), _ = case.run(case.params, case.images)
    expected = case.reference(reference.float64(case.params))
    near(latent, expected.latent)
    near(pred, expected.pred)
    np.testing.assert_array_equal(mask, expected.mask)
    np.testing.assert_allclose(per_example, expected.loss, rtol=1e-5)
    np.testing.assert_allclose(loss, expected.loss.mean(), rtol=1e-5)


def test_gradient_of_every_parameter_is_the_difference_quotient(case: Case):
    """A parameter whose gradient is cut off trains silently as a constant."""
    _, grads = case.run(case.params, case.images)
    exact = reference.float64(case.params)
    leaves, structure = jax.tree.flatten(exact)
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(case.params)]
    rng = np.random.default_rng(4)
    step = 1e-4
    for index, (name, grad) in enumerate(zip(names, jax.tree.leaves(grads), strict=True)):
        grad = np.asarray(grad, np.float64)
        assert np.abs(grad).max() > 0, name
        # Random, with a part along the gradient so that the quotient is not small by accident.
        direction = rng.normal(size=grad.shape) / np.sqrt(grad.size) + grad / np.linalg.norm(grad)
        values = []
        for sign in (1, -1):
            moved = [*leaves]
            moved[index] = leaves[index] + sign * step * direction
            values.append(case.reference(jax.tree.unflatten(structure, moved)).loss.mean())
        quotient = (values[0] - values[1]) / (2 * step)
        assert (grad * direction).sum() == pytest.approx(quotient, rel=2e-4), name


def test_removed_pixels_are_never_seen(case: Case):
    """They are the answer: if one leaks, the loss is a lie. NaN in all of them changes not one bit."""
    (_, (latent, pred, mask, _)), _ = case.run(case.params, case.images)
    removed = patches.unpatchify(
        jnp.broadcast_to(mask[:, :, None], (*mask.shape, int(np.prod(case.images.shape[1:])) // mask.shape[1])),
        case.config["image_size"],
        case.config["patch_size"],
    )
    for other in (np.nan, 0.123):
        changed = np.where(np.asarray(removed) == 1, np.float32(other), case.images)
        assert (changed != case.images).any()
        (_, (latent2, pred2, _, _)), _ = case.run(case.params, changed)
        np.testing.assert_array_equal(latent2, latent)
        np.testing.assert_array_equal(pred2, pred)


def test_kept_pixels_are_seen_by_their_own_example_only(case: Case):
    """Every kept patch reaches every token and every prediction of its image, and no other image's."""
    (_, (latent, pred, _, _)), _ = case.run(case.params, case.images)
    height, width = case.config["patch_size"]
    across = case.config["image_size"][1] // width
    for patch in np.asarray(case.ids_shuffle[1, : case.kept]):
        changed = case.images.copy()
        changed[1, patch // across * height, patch % across * width, 0] += 0.5
        (_, (latent2, pred2, _, _)), _ = case.run(case.params, changed)
        for before, after in ((latent, latent2), (pred, pred2)):
            differs: np.ndarray = np.any(np.asarray(before) != np.asarray(after), axis=-1)  # (B, N)
            assert differs[1].all()
            assert not differs[[0, 2]].any()


@pytest.fixture(scope="module")
def noisy() -> Callable[..., np.ndarray]:
    """(images, keys) -> predictions of a model with dropout and DropPath."""
    graphdef, params = make_params({**BASE, "drop_path": 0.5, "dropout": 0.2})
    ids = jnp.broadcast_to(jnp.arange(16), (BATCH, 16))
    forward = jax.jit(lambda images, keys: nnx.merge(graphdef, params)(images, ids, 4, keys)[0], compiler_options=QUICK)
    return lambda images, keys: np.asarray(forward(images, keys))


def test_dropout_of_an_example_does_not_depend_on_its_neighbours(noisy):
    """Otherwise a run would change with its number of devices or of accumulation steps."""
    rng = np.random.default_rng(5)
    images = rng.uniform(size=(BATCH, 12, 12, 3)).astype(np.float32)
    keys = jax.random.split(jax.random.key(6), BATCH)
    pred = noisy(images, keys)
    np.testing.assert_array_equal(noisy(images, keys), pred)
    assert np.abs(noisy(images, jax.random.split(jax.random.key(7), BATCH)) - pred).max() > 0.01
    images2, keys2 = images.copy(), jnp.stack([keys[0], keys[2], keys[1]])
    images2[1:] = images[:0:-1]
    np.testing.assert_allclose(noisy(images2, keys2), pred[[0, 2, 1]], atol=2e-6)


@pytest.mark.parametrize("variant", ["paper", "cross, all blocks, scanned"])
def test_bfloat16_keeps_float32_parameters_and_outputs(variant):
    """Half-precision parameters would lose small updates, a half-precision loss its digits."""
    full, half = make_case(variant), make_case(variant, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype("float32")}
    (loss, (_, pred, _, _)), grads = full.run(full.params, full.images)
    (loss2, (latent2, pred2, _, _)), grads2 = half.run(half.params, half.images)
    assert latent2.dtype == jnp.bfloat16
    assert pred2.dtype == loss2.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(grads2)} == {jnp.dtype("float32")}
    near(pred2, np.asarray(pred), rel=0.05)
    assert float(loss2) == pytest.approx(float(loss), rel=0.02)
    ours, theirs = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(g)]) for g in (grads2, grads))
    assert ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs) > 0.99


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({}, {"encoder/positions/embedding", "decoder/positions/embedding"}),
        ({"pos_embed": "learned"}, set()),
        ({"cls_token": "zero", "pos_embed": "learned"}, {"encoder/cls_token"}),
        (
            {"cls_token": "none", "mask_token": "zero", "pos_embed": "learned"},
            {"encoder/cls_token", "decoder/mask_token"},
        ),
    ],
)
def test_constants_are_no_parameters(changes, absent):
    """A fixed position or zero token among the parameters would be trained and decayed."""
    _, params = abstract_params(lambda: autoencoder.MaskedAutoencoder(**{**BASE, **changes}, rngs=nnx.Rngs(0)))
    names = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    optional = {
        "encoder/positions/embedding",
        "decoder/positions/embedding",
        "encoder/cls_token",
        "decoder/mask_token",
    }
    assert optional - names == absent


def _stack_count(width: int, depth: int, hidden: int, layer_scale: bool) -> int:
    """Values in `depth` blocks: two norms, qkv, out, two MLP layers, LayerScale; and the last norm."""
    norms = 2 * 2 * width
    attention = (width * 3 * width + 3 * width) + (width * width + width)
    mlp = (width * hidden + hidden) + (hidden * width + width)
    return depth * (norms + attention + mlp + 2 * width * layer_scale) + 2 * width


@pytest.mark.parametrize(("module", "total"), [(cifar_small, 450_032), (cifar_medium, 2_428_720)])
def test_parameters_by_hand(module, total):
    """The report's two models; a layer too many or shared would show."""
    model = module.get_config().model
    _, params = abstract_params(lambda: autoencoder.MaskedAutoencoder(**model.to_dict(), rngs=nnx.Rngs(0)))
    wide, narrow = model.embed_dim, model.decoder_embed_dim
    encoder = 48 * wide + wide + wide + _stack_count(wide, model.depth, 2 * wide, True)  # embedding, class token
    decoder = wide * narrow + narrow + narrow + _stack_count(narrow, model.decoder_depth, 2 * narrow, True)
    decoder += narrow * 48 + 48  # prediction
    assert param_count(params) == encoder + decoder == total


def make_classifier(**options: Any) -> Classifier:
    settings: dict[str, Any] = {
        "num_classes": 7,
        "kind": "linear",
        "hidden_dim": 5,
        "pool": "gap",
        "norm_after_pool": False,
        "batch_norm": False,
        **options,
    }
    return Classifier(BASE, **settings, hooks=PLAIN, rngs=nnx.Rngs(0))


def test_classifier_pools_all_patches():
    """Probing at the pretraining mask ratio was a mistake elsewhere; `gap` must leave the class token out."""
    images = jnp.asarray(np.random.default_rng(8).uniform(size=(2, 12, 12, 3)), jnp.float32)
    everything = jnp.broadcast_to(jnp.arange(16), (2, 16))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run() -> tuple[jax.Array, ...]:
        classifier = make_classifier()
        tokens = classifier.encoder(patches.patchify(images, (3, 3)), everything, None)
        cls = classifier.encoder.features(images, ("cls",))["cls"]
        return tokens, classifier.features(images, None), cls, classifier(images, None)

    tokens, gap, cls, logits = run()
    np.testing.assert_allclose(gap, tokens[:, 1:].mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(cls, tokens[:, 0], atol=1e-6)
    assert logits.shape == (2, 7)
    assert np.abs(logits).max() < 1e-3  # the head starts near zero


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"kind": "linear"}, 16 * 7 + 7),
        ({"kind": "mlp"}, 16 * 5 + 5 + 5 * 7 + 7),
        ({"kind": "linear", "norm_after_pool": True}, 16 * 7 + 7 + 2 * 16),
        ({"kind": "linear", "batch_norm": True}, 16 * 7 + 7),
    ],
)
def test_heads(options, count):
    """A classifier has no decoder, and one last norm: the encoder's or the head's."""
    _, params = abstract_params(lambda: make_classifier(**options))
    assert ("norm" in params["encoder"]) != options.get("norm_after_pool", False)
    assert set(params) - {"batch_norm"} == {"encoder", "head"}
    assert ("batch_norm" in params) == options.get("batch_norm", False)
    assert param_count(params["head"]) == count


@pytest.mark.long
def test_forward_mode():
    """The plain model has a directional derivative: the inner product of the gradient with the direction."""
    config = smoke_config()
    task = make_task(config, 10, PLAIN)
    params = jax.jit(task.init_params, compiler_options=QUICK)(jax.random.key(0))
    images = jax.random.randint(jax.random.key(1), (2, *config.model.image_size, 3), 0, 256, jnp.int32)
    batch, keys = {"image": images.astype(jnp.uint8)}, jax.random.split(jax.random.key(2), 2)
    direction = jax.tree.map(jnp.ones_like, params)

    def loss(params):
        return task.loss(params, batch, keys)[0].mean()

    forward = jax.jit(lambda params, direction: jax.jvp(loss, (params,), (direction,)), compiler_options=QUICK)
    value, along = forward(params, direction)
    expected, gradient = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    wanted = sum(np.asarray(leaf).sum() for leaf in jax.tree.leaves(gradient))
    np.testing.assert_allclose(along, wanted, rtol=1e-4)
