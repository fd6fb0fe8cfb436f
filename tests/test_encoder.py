"""A trained encoder as a function of images: the right numbers, for any batch, from every layout; clear refusals."""

import dataclasses
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import mae_dist
from mae_dist import config
from mae_dist.checkpoint import manager
from mae_dist.errors import ConfigError, DataFault
from mae_dist.evaluation.encode import KINDS
from mae_dist.evaluation.encoder import Encoder
from mae_dist.optim.train_state import TrainState
from mae_dist.weights import convert
from tests import reference
from tests.trained import in_memory

SCALING = {"data__mean": (0.4, 0.5, 0.6), "data__std": (0.2, 0.3, 0.25)}
CASES = {
    "gray, not square, learned positions": (
        ("cls", "patches"),
        {
            "model__depth": 1,
            "model__image_size": (8, 24),
            "model__patch_size": (4, 6),
            "model__channels": 1,
            "model__pos_embed": "learned",
            "model__cls_token": "zero",
            "data__mean": (0.5,),
            "data__std": (0.3,),
        },
    ),
    "three class tokens": (("cls", "mean", "patches"), {"model__depth": 1, "model__cls_tokens": 3}),
    "rgba, LayerScale, no class token": (
        ("mean", "patches"),
        {
            "model__depth": 1,
            "model__image_size": (16, 8),
            "model__patch_size": (8, 4),
            "model__channels": 4,
            "model__pos_embed": "sincos1d",
            "model__cls_token": "none",
            "model__layer_scale_init": 0.1,
            "model__gelu": "tanh",
            "data__mean": (0.1, 0.2, 0.3, 0.4),
            "data__std": (0.5, 0.4, 0.3, 0.2),
        },
    ),
}


def draw(source, count=3):
    """Random uint8 images for a model."""
    model = source.config.model
    return np.random.default_rng(1).integers(0, 256, (count, *model.image_size, model.channels), np.uint8)


def reference_tokens(source, images, num_blocks=None):
    """(mean of the class tokens (B, D) if there is one, patches (B, gh, gw, D)), computed in float64."""
    model, data = source.config.model, source.config.data
    options = reference.Options(model.patch_size, model.cls_token, model.pos_embed, model.gelu, norm_pix_loss=False)
    params = reference.float64(source.load_whole())
    tokens = reference.encode(params, (images / 255 - np.array(data.mean)) / np.array(data.std), options, num_blocks)
    num_cls = model.cls_tokens if model.cls_token != "none" else 0
    cls = tokens[:, :num_cls].mean(1) if num_cls else None
    grid = [size // patch for size, patch in zip(model.image_size, model.patch_size, strict=True)]
    return cls, tokens[:, num_cls:].reshape(len(images), *grid, -1)


def assert_close(found, wanted, tolerance=2e-5):
    """float32 of the wanted shape, and every value near the wanted one."""
    assert found.dtype == np.float32
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def source():
    """One block is enough where it is not about blocks, and compiles faster."""
    return in_memory(**SCALING, model__depth=1)


@pytest.fixture(scope="module")
def encoder(source):
    return Encoder(source)


# --- the numbers


def assert_equals_reference(encoder, source, kinds):
    """The output of the last block, and the attributes that say its shape."""
    images = draw(source)
    cls, patches = reference_tokens(source, images)
    wanted = {"cls": cls, "patches": patches, "mean": patches.mean((1, 2))}
    for kind in kinds:
        assert_close(encoder.features(images, kind), wanted[kind])
    assert (*encoder.image_size, encoder.channels) == images.shape[1:]
    assert (*encoder.grid, encoder.embed_dim) == patches.shape[1:]


def test_every_kind_equals_the_reference(source, encoder):
    """All patches in their places, scaled as in training, normalised at the end."""
    assert_equals_reference(encoder, source, KINDS)


@pytest.mark.parametrize(("kinds", "fields"), CASES.values(), ids=CASES)
def test_other_models_equal_the_reference(kinds, fields):
    """Other shapes of images, patches and colours; other positions and tokens."""
    source = in_memory(**fields)
    assert_equals_reference(Encoder(source), source, kinds)


@pytest.mark.parametrize(("blocks", "fields"), [((0, 1, 2, None), {}), ((1, None), {"model__scan": True})])
def test_blocks_are_without_norm(blocks, fields):
    """What enters the first block, and what leaves each, as it is added up; so where a loop over them stops early."""
    source = in_memory(**SCALING, **fields)
    encoder, images = Encoder(source), draw(source)
    assert encoder.depth == 2
    for block in blocks:
        _, patches = reference_tokens(source, images, block)
        assert_close(encoder.features(images, "patches", block=block), patches)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, jnp.bfloat16])
def test_floats_equal_bytes(source, encoder, dtype):
    """0..1 is the same picture as 0..255, up to what the type can hold."""
    images = draw(source)
    tolerance = 1e-5 if np.finfo(np.float32).eps >= jnp.finfo(dtype).eps else 0.1
    assert_close(encoder.features((images / 255).astype(dtype)), encoder.features(images), tolerance)


def test_batches_leave_no_trace(source, encoder):
    """Padding, and where a batch ends: the same rows as one by one; the same bits when asked again."""
    images = draw(source, 257)
    alone = encoder.features(images, batch_size=1)
    for count in (0, 1, 3, 257):
        assert_close(encoder.features(images[:count]), alone[:count], 1e-6)
    np.testing.assert_array_equal(encoder.features(images), encoder.features(images))
    assert encoder.features(images[:0], "patches").shape == (0, 4, 4, 32)


def test_nothing_is_random(source, encoder):
    """Dropout and DropPath are for training."""
    dropping = Encoder(in_memory(**SCALING, model__depth=1, model__dropout=0.5, model__drop_path=0.5))
    np.testing.assert_array_equal(dropping.features(draw(source)), encoder.features(draw(source)))


def test_half_precision(source, encoder):
    """Computed in bfloat16, given out as float32."""
    images = draw(source)
    half = Encoder(in_memory(**SCALING, model__depth=1, model__dtype="bfloat16")).features(images)
    assert_close(half, encoder.features(images), 0.1)
    assert np.abs(half - encoder.features(images)).max() > 1e-4


def test_norm_after_pooling():
    """A classifier's features are what its head's norm gives; of a block, they have none."""
    source = in_memory(task="finetune", classify__norm_after_pool=True, model__depth=1)
    encoder, images = Encoder(source), draw(source)
    pooled = reference_tokens(source, images, num_blocks=1)[1].mean((1, 2))
    norm, centred = source.load_whole()["head"]["norm"], pooled - pooled.mean(1, keepdims=True)
    normalised = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-6) * norm["scale"] + norm["bias"]
    assert_close(encoder.features(images), normalised)
    assert_close(encoder.features(images, block=1), pooled)


# --- refusals


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x[0], (r"\(16, 16, 3\)", r"\(B, 16, 16, 3\)")),
        (lambda x: x[:, :8], (r"\(2, 8, 16, 3\)", r"\(B, 16, 16, 3\)", "resize")),
        (lambda x: x[..., :1], (r"\(2, 16, 16, 1\)", r"\(B, 16, 16, 3\)")),
        (lambda x: x.astype(np.int32), ("int32", "uint8 in 0..255")),
        (lambda x: x > 100, ("bool", "floating-point in 0..1")),
        (lambda x: x.astype(object), ("object", "uint8")),
        (lambda x: x.astype(np.float32), ("0 to 255", r"0\.\.1")),
        (lambda x: x / 255 - 0.5, (r"-0\.5 to 0\.5", r"0\.\.1")),
        (lambda x: np.where(x == x.max(), np.nan, x / 255), ("nan", r"0\.\.1")),
    ],
)
def test_wrong_images_are_refused(source, encoder, change, words):
    """Both what came and what is needed."""
    images = draw(source, 2)
    images[0, 0, 0] = (0, 255, 255)
    with pytest.raises(DataFault, match=".*".join(words)):
        encoder.features(change(images))


def test_overshoot_of_resizing_is_taken(source, encoder):
    """Bicubic interpolation leaves 0..1 a little."""
    assert np.isfinite(encoder.features(draw(source) / 255 * 1.1 - 0.05)).all()


def test_a_class_token_that_is_missing_is_named():
    """What to take instead."""
    encoder = Encoder(in_memory(model__cls_token="none"))
    with pytest.raises(ConfigError, match=r"'cls' .* the model has none; choose 'mean' or 'patches'"):
        encoder.features(np.zeros((1, 16, 16, 3), np.uint8), "cls")


def test_wrong_choices_are_refused(source, encoder):
    """What there is instead; also for no images at all."""
    for images in (draw(source), draw(source, 0)):
        with pytest.raises(ConfigError, match="no 'avg' features; choose of mean, cls, patches"):
            encoder.features(images, "avg")
        for block in (-1, 2):
            with pytest.raises(ConfigError, match=f"block {block}: the encoder has blocks 1 to 1"):
                encoder.features(images, block=block)
        for batch_size in (0, -1):
            with pytest.raises(ConfigError, match=f"batch_size {batch_size}"):
                encoder.features(images, batch_size=batch_size)
        for name in ("block", "batch_size"):
            for value in (1.0, 2.5, "1", [1], np.float32(1)):
                with pytest.raises(ConfigError, match=rf"{name}={re.escape(repr(value))} is no whole number"):
                    encoder.features(images, **{name: value})
        with pytest.raises(ConfigError, match=r"no \['mean'\] features"):
            encoder.features(images, ["mean"])
    whole = encoder.features(draw(source), block=np.int64(1), batch_size=np.int32(3))
    np.testing.assert_array_equal(whole, encoder.features(draw(source), block=1, batch_size=3))


def test_a_head_that_is_missing_is_named():
    """A fine-tuned encoder alone, whose features need the norm in its head."""
    source = in_memory(task="finetune", classify__norm_after_pool=True)
    with pytest.raises(ConfigError, match=r"norm_after_pool.* has no head"):
        Encoder(dataclasses.replace(source, abstract={"encoder": source.abstract["encoder"]}))


# --- where it comes from


def save_run(path, source):
    """The workdir of a run that was saved at step 3."""
    path.mkdir()
    text = config.to_json(source.config)
    (path / "config.json").write_text(text)
    options = {**source.config.checkpoint.to_dict(), "log_every_steps": 1, "total_steps": 3}
    with manager.Checkpoints(epath.Path(path), **options) as checkpoints:
        state = TrainState(step=jnp.int32(3), params=source.load_whole(), opt_state=())
        checkpoints.save(3, state, {"config": text, "data_fingerprint": ""}, {})
    return path


@pytest.mark.parametrize("layout", ["run", "mae_dist", "hf", "timm"])
def test_loads_every_layout(source, encoder, tmp_path, layout):
    """The same features, whoever wrote the weights."""
    images = draw(source)
    if layout == "run":
        loaded = mae_dist.load_encoder(save_run(tmp_path / "run", source))
        assert "run, step 3: 16x16x3 -> 32, 1 blocks" in repr(loaded)
    else:
        path = tmp_path / ("weights.safetensors" if layout == "timm" else "weights")
        convert.convert_weights(source, epath.Path(path), layout)
        # timm's files say neither the number of heads nor the scaling of pixels.
        loaded = mae_dist.load_encoder(str(path), *([source.config] if layout == "timm" else []))
    assert_close(loaded.features(images), encoder.features(images), 1e-6)


def test_unknown_heads_and_missing_paths_are_refused(source, tmp_path):
    """Nothing is guessed in silence."""
    convert.convert_weights(in_memory(), epath.Path(tmp_path / "a.safetensors"), "timm", encoder_only=True)
    with pytest.raises(ConfigError, match=r"model\.num_heads and a width of 32"):
        mae_dist.load_encoder(tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="none does not exist"):
        mae_dist.load_encoder(tmp_path / "none")


def test_import_is_light(child_env):
    """JAX comes with the encoder, not with the package; a wrong name says what there is."""
    program = """
import sys, mae_dist
try:
    mae_dist.load_model
except AttributeError as error:
    assert "'load_model'" in str(error) and "load_encoder" in str(error), error
else:
    raise AssertionError
assert "jax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], env=child_env(), check=True, timeout=60)
