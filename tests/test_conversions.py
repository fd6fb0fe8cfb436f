"""Every conversion computes the same function: compared from pixels in 0..255 to outputs, in float64 by `reference`.

Scaling differs from channel to channel throughout: a conversion that forgets it computes something else.
"""

from typing import Any

import numpy as np
import pytest
import torch
from etils import epath
from ml_collections import ConfigDict

from mae_dist.errors import ConfigError
from mae_dist.model import heads
from mae_dist.weights import adapt, convert, pretrained
from tests import reference
from tests.trained import in_memory, save

MEAN, STD = (0.485, 0.456, 0.306, 0.62), (0.229, 0.224, 0.325, 0.11)
SMALL = {"model__image_size": (12, 8), "model__embed_dim": 16, "model__depth": 1, "model__decoder_embed_dim": 12}
SQUARE = {**SMALL, "model__image_size": (8, 8)}


def trained(channels: int, **overrides: Any) -> pretrained.Pretrained:
    return in_memory(
        **{
            **SMALL,
            "model__channels": channels,
            "data__mean": MEAN[:channels],
            "data__std": STD[:channels],
            **overrides,
        }
    )


def scaled(config: ConfigDict, pixels: np.ndarray) -> np.ndarray:
    """Pixels in 0..255, any float, as the model of this config sees them."""
    return (pixels / 255 - np.array(config.data.mean)) / np.array(config.data.std)


def options_of(config: ConfigDict) -> reference.Options:
    model = config.model
    return reference.Options(model.patch_size, model.cls_token, model.pos_embed, model.gelu, norm_pix_loss=False)


def tokens_of(config: ConfigDict, params: Any, pixels: np.ndarray, num_blocks: int | None = None) -> np.ndarray:
    return reference.encode(reference.float64(params), scaled(config, pixels), options_of(config), num_blocks)


def predicted(config: ConfigDict, params: Any, pixels: np.ndarray) -> np.ndarray:
    """Pixels in 0..255 (B, L, ph * pw, C) that the decoder predicts when it sees the first two patches."""
    height, width = (
        size // patch for size, patch in zip(config.model.image_size, config.model.patch_size, strict=True)
    )
    ids = np.tile(np.arange(height * width), (len(pixels), 1))
    found = reference.autoencoder(reference.float64(params), scaled(config, pixels), ids, 2, options_of(config))
    values = found.pred.reshape(len(pixels), height * width, -1, config.model.channels)
    return (values * np.array(config.data.std) + np.array(config.data.mean)) * 255


def as_seen_before(pixels: np.ndarray, old: int) -> np.ndarray:
    """What the docstring of `adapt_channels` says the old model saw in images of other channels."""
    colors = pixels[..., :3]
    if old == 1:
        return colors.mean(-1, keepdims=True)
    colors = np.broadcast_to(colors, (*colors.shape[:-1], 3))
    return np.concatenate([colors, np.full_like(colors[..., :1], 255)], axis=-1)[..., :old]


@pytest.mark.parametrize(("old", "new"), [(a, b) for a in (1, 3, 4) for b in (1, 3, 4) if a != b])
@pytest.mark.parametrize("shared", [False, True])
def test_channels(old, new, shared):
    """Exact to 1e-12: tokens of images of any colours and transparency, and the pixels that are predicted."""
    one = {"data__mean": MEAN[:1], "data__std": STD[:1]} if shared else {}
    source = trained(old, model__mask_ratio=0.5, **one)
    config, params = source.config, reference.float64(source.load_whole())
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 12, 8, new)).astype(float)
    before = as_seen_before(images, old)
    tokens, pixels = tokens_of(config, params, before), predicted(config, params, before)
    with config.unlocked():
        adapted = adapt.adapt_channels(params, config, new)
    assert config.model.channels == new
    assert {len(config.data.mean), len(config.data.std)} == ({1} if shared or old == 1 else {new})
    np.testing.assert_allclose(tokens_of(config, adapted, images), tokens, rtol=1e-12, atol=1e-12)
    wanted = pixels[..., :3].mean(-1, keepdims=True) if new == 1 else pixels[..., :3]
    wanted = np.concatenate([np.broadcast_to(wanted, (*wanted.shape[:-1], min(new, 3))), pixels[..., 3:]], axis=-1)
    found = predicted(config, adapted, images)
    np.testing.assert_allclose(found[..., : min(new, 3)], wanted[..., : min(new, 3)], rtol=1e-10, atol=1e-10)
    if new == 4:
        np.testing.assert_allclose(found[..., 3], 255, rtol=1e-12)


def test_channels_that_cannot_be():
    source = trained(3)
    with source.config.unlocked(), pytest.raises(ConfigError, match=r"--channels=2 from 3"):
        adapt.adapt_channels(source.load_whole(), source.config, 2)


def test_normalised_predictions_are_said_to_be_inexact(caplog):
    source = trained(3, pretrain__norm_pix_loss=True)
    with source.config.unlocked():
        adapt.adapt_channels(source.load_whole(), source.config, 1)
    assert "near the old ones, not equal" in caplog.text


def logits_of(config: ConfigDict, params: Any, pixels: np.ndarray) -> np.ndarray:
    """Of a linear head on the class token."""
    params = reference.float64(params)
    features = tokens_of(config, params, pixels)[:, 0]
    if "batch_norm" in params:
        features = (features - params["batch_norm"]["mean"]) / np.sqrt(params["batch_norm"]["var"] + heads.EPS)
    return features @ params["head"]["linear"]["kernel"] + params["head"]["linear"]["bias"]


PROBE = {"task": "probe", "init_from": "x", "classify__pool": "cls", "classify__batch_norm": True}


@pytest.mark.parametrize("to", ["hf", "timm", "mae_dist"])
@pytest.mark.parametrize(
    ("channels", "fields"),
    [
        (None, {"model__layer_scale_init": 0.1}),
        (1, {"model__pos_embed": "learned"}),
        (4, {"model__gelu": "tanh", "model__layer_scale_init": 0.1}),
        (1, PROBE),
    ],
    ids=["LayerScale", "gray", "rgba", "BatchNorm"],
)
def test_layouts(tmp_path, to, channels, fields):
    """Written, read by what the files say and for timm the config, and computed from pixels again."""
    source = trained(3, **SQUARE, **fields)
    config, params = source.config.copy_and_resolve_references(), source.load_whole()
    if "batch_norm" in params:
        params["batch_norm"]["var"] = np.abs(params["batch_norm"]["var"])
    source = pretrained.Pretrained(source.config, source.origin, source.abstract, True, lambda _: params)
    gray = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 1), np.uint8)
    outputs = logits_of if "head" in params else tokens_of
    wanted = outputs(config, params, np.repeat(gray, 3, -1))
    out = epath.Path(tmp_path / ("w.safetensors" if to == "timm" else "w"))
    convert.convert_weights(source, out, to, channels=channels)
    # The source's config is that of what was written: for timm what the files do not say.
    back = pretrained.open_pretrained(out, source.config if to == "timm" else None)
    after = np.repeat(gray, channels or 3, -1)
    after[..., 3:] = 255
    assert back.config.model.channels == after.shape[-1]
    np.testing.assert_allclose(outputs(back.config, back.load_whole(), after), wanted, rtol=1e-5, atol=1e-5)


def test_image_size(tmp_path):
    """Positions as PyTorch interpolates them, all else as it was; together with other channels."""
    source = trained(3, model__pos_embed="learned")
    config, params = source.config.copy_and_resolve_references().unlock(), source.load_whole()
    convert.convert_weights(source, epath.Path(tmp_path / "w"), "mae_dist", image_size=(24, 8), channels=1)
    table = torch.tensor(params["encoder"]["positions"]["embedding"]).reshape(1, 3, 2, -1).permute(0, 3, 1, 2)
    table = torch.nn.functional.interpolate(table, size=(6, 2), mode="bicubic", align_corners=False)
    params["encoder"]["positions"]["embedding"] = table.permute(0, 2, 3, 1).reshape(12, -1).numpy()
    gray = np.random.default_rng(1).integers(0, 256, (2, 24, 8, 1), np.uint8)
    wanted = tokens_of(config, params, np.repeat(gray, 3, -1))
    back = pretrained.open_pretrained(epath.Path(tmp_path / "w"))
    np.testing.assert_allclose(tokens_of(back.config, back.load_whole(), gray), wanted, rtol=1e-5, atol=1e-5)


def test_a_run_converted_to_itself_is_untouched(tmp_path):
    """No channels asked for, or those it has: the same bits."""
    source = trained(3)
    params = source.load_whole()
    save(tmp_path / "run", source)
    again = pretrained.open_pretrained(epath.Path(tmp_path / "run"))
    convert.convert_weights(again, epath.Path(tmp_path / "w"), "mae_dist", channels=3)
    back = pretrained.open_pretrained(epath.Path(tmp_path / "w"))
    assert back.config.data == source.config.data
    np.testing.assert_array_equal(
        back.load_whole()["encoder"]["patch_embed"]["kernel"], params["encoder"]["patch_embed"]["kernel"]
    )
