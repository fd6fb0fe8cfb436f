"""Random erasing, mixup and cutmix: by their definitions, for every example by itself, and the same on any devices."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_dist.data.from_config import Data, open_data
from mae_dist.errors import ConfigError
from mae_dist.model.build import abstract_params
from mae_dist.model.hooks import PLAIN
from mae_dist.tasks import losses, mixing
from mae_dist.tasks.make import make_task
from mae_dist.training import job
from tests import QUICK
from tests.runs import compile_quickly, first_batch, smoke_config

SIZE = (12, 20)
MIXED: dict[str, Any] = {
    "task": "finetune",
    "global_batch_size": 64,
    "total_steps": 3,
    "optim__warmup_epochs": 0.0,
    "classify__mixup": 0.8,
    "classify__cutmix": 1.0,
    "classify__erase_prob": 0.25,
    "classify__label_smoothing": 0.1,
    "model__depth": 1,
}


@pytest.fixture(scope="module")
def images():
    """Noise: no two pixels are equal."""
    return jax.random.normal(jax.random.key(7), (1024, *SIZE, 3))


@pytest.fixture(scope="module")
def keys():
    return jax.random.split(jax.random.key(0), 1024)


def mix(images, keys, mixup=0.0, cutmix=0.0, prob=1.0, switch_prob=0.5):
    return jax.tree.map(
        np.asarray, mixing.mix(images, keys, mixup=mixup, cutmix=cutmix, prob=prob, switch_prob=switch_prob)
    )


def swapped(x):
    """The neighbours, written out."""
    return np.asarray(x)[[row ^ 1 for row in range(len(x))]]


def test_mixup(images, keys):
    """Own share times the image plus the rest of the neighbour; shares as Beta(0.8, 0.8), another for every example."""
    mixed, share = mix(images, keys, mixup=0.8)
    own = share[:, None, None, None]
    np.testing.assert_allclose(mixed, own * images + (1 - own) * swapped(images), atol=1e-5)
    assert len(np.unique(share)) == len(share)
    assert share.mean() == pytest.approx(0.5, abs=0.03)
    assert share.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.1)


def test_cutmix(images, keys):
    """One box is the neighbour's; the own share is what is left of the pixels, also where a border cuts the box."""
    mixed, share = mix(images, keys, cutmix=1.0)
    theirs = (mixed == swapped(images)).all(-1)
    assert ((mixed == images).all(-1) ^ theirs).all()
    np.testing.assert_allclose(share, 1 - theirs.mean((1, 2)), atol=1e-6)
    tall, wide = theirs.any(2).sum(1), theirs.any(1).sum(1)
    np.testing.assert_array_equal(tall * wide, theirs.sum((1, 2)))
    assert theirs.any(0).all(), "the boxes lie anywhere"
    assert len({box.tobytes() for box in theirs}) > 0.5 * len(theirs)
    # The box that is not cut has sides sqrt(1 - share) with a uniform share, in whole and even pixels: E = 2/3.
    assert (tall / SIZE[0]).max() > 0.8
    assert 0.5 < share.mean() < 0.75


def test_both(images, keys):
    """`switch_prob` of the mixed ones by cutmix; `prob` of all are mixed."""
    mixed, share = mix(images, keys, mixup=0.8, cutmix=1.0, prob=0.5, switch_prob=0.25)
    own = (mixed == images).all(-1).mean((1, 2))
    alone, boxed = own == 1, (own > 0) & (own < 1)
    assert alone.mean() == pytest.approx(0.5, abs=0.05)
    assert boxed.mean() == pytest.approx(0.125, abs=0.04)
    np.testing.assert_allclose(share[alone], 1)


def test_erase(images, keys):
    """A quarter of the images lose one box of 2 to 33 % to noise as of the whole image, and nothing else."""
    erased = np.asarray(mixing.erase(images, keys, 0.25))
    gone = (erased != images).any(-1)
    area = gone.mean((1, 2))
    hit = area > 0
    assert hit.mean() == pytest.approx(0.25, abs=0.04)
    tall, wide = gone.any(2).sum(1)[hit], gone.any(1).sum(1)[hit]
    np.testing.assert_array_equal(tall * wide, gone.sum((1, 2))[hit])
    aspect = tall / wide
    assert 0.15 < aspect.min() < 0.5 < 2 < aspect.max() < 6.7  # 0.3 to 3.3, in whole pixels of small boxes
    assert 0.01 < area[hit].min() < 0.05
    assert 0.25 < area[hit].max() < 0.4
    noise = erased[gone]  # (pixels, C)
    assert noise.mean() == pytest.approx(0, abs=0.05)
    assert noise.std() == pytest.approx(1, abs=0.05)
    assert len(np.unique(noise)) > 0.99 * noise.size


def test_labels():
    """Smoothed one-hot vectors, mixed; the label of the larger part."""
    labels, share = jnp.array([3, 1, 2, 2]), jnp.array([0.75, 0.4, 0.1, 1.0])
    soft, larger = mixing.mix_labels(labels, share, 4)
    np.testing.assert_array_equal(larger, [3, 3, 2, 2])
    smooth = np.eye(4) * 0.9 + 0.1 / 4
    target = np.stack([0.75 * smooth[3] + 0.25 * smooth[1], 0.4 * smooth[1] + 0.6 * smooth[3], smooth[2], smooth[2]])
    logits = jax.random.normal(jax.random.key(0), (4, 4))
    expected = -(target * np.asarray(jax.nn.log_softmax(logits))).sum(-1)
    np.testing.assert_allclose(losses.cross_entropy(logits, soft, 0.1), expected, rtol=1e-5)


@pytest.fixture(scope="module")
def data():
    return open_data(smoke_config(**MIXED))


def first_update(data: Data, num_devices: int, **options: Any) -> list[tuple[float, float]]:
    """(loss, norm of the gradient) of the first images and parameters as steps 0, 1, 2 and 1 again, by one program."""
    built = job.build(smoke_config(**{**MIXED, **options}), jax.devices()[:num_devices], data)
    batch, values = first_batch(built), []
    init, update = compile_quickly(built, batch)
    with jax.set_mesh(built.mesh):
        for step in (0, 1, 2, 1):
            state = init()
            state = state.replace(step=jax.device_put(jnp.int32(step), state.step.sharding))
            metrics = update(state, batch)[1]
            values.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return values


# With nothing else random: no erasing, no DropPath, always the same images.
ALONE = {
    "mixup": {"classify__cutmix": 0.0, "classify__erase_prob": 0.0},
    "cutmix": {"classify__mixup": 0.0, "classify__erase_prob": 0.0},
}


@pytest.mark.parametrize("kind", ["mixup", pytest.param("cutmix", marks=pytest.mark.long)])
def test_every_update_draws_anew(data, kind):
    """A draw frozen when the update is compiled would show nowhere else, nor in a loss, which starts at ln 10."""
    norms = [norm for _, norm in first_update(data, 1, cpu__pieces=1, **ALONE[kind])]
    for a, b in itertools.combinations(norms[:3], 2):
        assert abs(a / b - 1) > 1e-4
    assert norms[3] == norms[1]


@pytest.mark.parametrize("kind", list(ALONE))
def test_every_example_draws_anew(kind):
    """The same two images in all pairs: each gets another loss, and in another update another one again."""
    config = smoke_config(**{**MIXED, **ALONE[kind]})
    task = make_task(config, 10, PLAIN)
    rng = np.random.default_rng(0)
    # Random values also where training starts near zero: else the images would hardly matter.
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32), abstract_params(config, 10)
    )
    pair = rng.integers(0, 256, (2, *config.model.image_size, 3), np.uint8)
    batch = {"image": jnp.asarray(np.tile(pair, (32, 1, 1, 1))), "label": jnp.tile(jnp.array([3, 7], jnp.int32), 32)}
    loss = jax.jit(lambda keys: task.loss(params, batch, keys)[0], compiler_options=QUICK)
    found = np.stack([loss(jax.random.split(jax.random.key(step), 64)) for step in range(3)])
    for which in range(2):
        same_image = found[:, which::2]
        assert len(np.unique(same_image)) > 0.8 * same_image.size  # a box may come twice, or be empty
    changed = [found[a] != found[b] for a, b in itertools.combinations(range(3), 2)]
    assert np.mean(changed) > 0.8


@pytest.mark.long
def test_same_pairs_on_any_devices(data):
    """Whatever splits the batch leaves neighbours together and their draws as they are."""
    one_device = first_update(data, 1, cpu__pieces=1)
    pieces = first_update(data, 4, mesh__data=4, accum_steps=2, cpu__pieces=4)
    np.testing.assert_allclose(pieces, one_device, rtol=1e-5)
    split = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    np.testing.assert_allclose(first_update(data, 8, **split, accum_steps=4, cpu__pieces=1), one_device, rtol=1e-5)


def test_pairs_must_divide():
    """Both numbers and the cure, before any device work."""
    with pytest.raises(
        ConfigError, match=r"global_batch_size=24 .* x pairs to mix = 8 x 1 x 1 x 2 = 16; nearest .* 3?2"
    ):
        job.check_mesh(smoke_config(task="finetune", classify__mixup=0.8, global_batch_size=24, mesh__data=8), 8)


@pytest.mark.long
def test_scan_remat_and_dtype_change_nothing_but_digits():
    """How a mixed batch is carried through the blocks; DropPath is drawn again in a second forward pass."""
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.integers(0, 256, (16, 8, 8, 3), np.uint8)),
        "label": jnp.asarray(rng.integers(0, 10, 16, np.int32)),
    }
    options = {**MIXED, "model__depth": 2, "model__drop_path": 0.4, "model__image_size": (8, 8)}
    # Random values also where training starts near zero, which would hide everything before the head.
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32),
        abstract_params(smoke_config(**options), 10),
    )
    keys = jax.random.split(jax.random.key(1), 16)

    def update(dtype: str, scan: bool, remat: str) -> tuple[float, np.ndarray]:
        config = smoke_config(**options, model__dtype=dtype, model__scan=scan, model__remat=remat)
        task = make_task(config, 10, PLAIN)
        grad_fn = jax.value_and_grad(lambda p: task.loss(p, batch, keys)[0].mean())
        value, grads = jax.jit(grad_fn, compiler_options=QUICK)(params)
        return float(value), np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])

    value, grads = update("float32", False, "none")
    found, others = update("float32", True, "blocks")
    assert found == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(others, grads, rtol=1e-3, atol=1e-5 * np.abs(grads).max())
    found, others = update("bfloat16", True, "dots")
    assert found == pytest.approx(value, rel=2e-2)
    assert others @ grads / np.linalg.norm(others) / np.linalg.norm(grads) > 0.99
