"""Weights in the layout of `transformers.PixioModel`, whose encoder has several class tokens, and its features."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from etils import epath
from transformers import AutoImageProcessor, AutoModel, PixioBackbone, PixioConfig, PixioModel

from mae_dist.errors import ConfigError
from mae_dist.evaluation.encoder import Encoder
from mae_dist.weights import convert, pretrained
from mae_dist.weights.pretrained import Pretrained
from tests.trained import in_memory

torch.set_num_threads(1)
SMALL = {
    **{"model__image_size": (16, 16), "model__patch_size": (4, 4), "model__embed_dim": 24, "model__num_heads": 3},
    **{"model__depth": 2, "model__mlp_ratio": 2.0, "model__cls_tokens": 4},
    **{"data__mean": (0.485, 0.456, 0.306), "data__std": (0.229, 0.224, 0.325)},
}
CASES: dict[str, dict[str, Any]] = {
    "sincos2d": {},
    "one class token, LayerScale": {"model__cls_tokens": 1, "model__layer_scale_init": 0.1},
    "learned, no qkv bias, tanh": {"model__pos_embed": "learned", "model__qkv_bias": False, "model__gelu": "tanh"},
}


def images(count: int = 3, side: int = 16) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, side, side, 3), np.uint8)


def their_features(model: Any, pixels: np.ndarray, num_cls: int) -> dict[str, np.ndarray]:
    with torch.inference_mode():
        found = model(torch.from_numpy(pixels).permute(0, 3, 1, 2).float())
    tokens = found.last_hidden_state.numpy()
    side = pixels.shape[1] // model.config.patch_size
    grid = tokens[:, num_cls:].reshape(len(tokens), side, side, -1)
    return {"cls": found.pooler_output.numpy(), "patches": grid, "mean": grid.mean((1, 2))}


def pairs_of_features(source: Pretrained, model: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Ours and theirs, of each kind."""
    data, encoder, given = source.config.data, Encoder(source), images(side=source.config.model.image_size[0])
    pixels = (given / 255 - np.array(data.mean)) / np.array(data.std)
    theirs = their_features(model, pixels, source.config.model.cls_tokens)
    return {kind: (encoder.features(given, kind), wanted) for kind, wanted in theirs.items()}


def assert_same_features(source: Pretrained, model: Any) -> None:
    for ours, theirs in pairs_of_features(source, model).values():
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def random_pixio(kind: Any = PixioModel, **fields: Any) -> Any:
    """A model of theirs whose every parameter counts."""
    torch.manual_seed(0)
    model = kind(PixioConfig(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return model


@pytest.mark.parametrize("case", CASES)
def test_ours_in_their_hands_and_back(tmp_path: Path, case: str):
    """The same features, class tokens averaged, and every bit again."""
    source = in_memory(**{**SMALL, **CASES[case]})
    out = epath.Path(tmp_path / "theirs")
    convert.convert_weights(source, out, "pixio", encoder_only=True)
    model = AutoModel.from_pretrained(out)
    assert isinstance(model, PixioModel)
    back = pretrained.open_pretrained(out)
    assert_same_features(back, model)
    assert back.config.model.pos_embed == source.config.model.pos_embed
    again = epath.Path(tmp_path / "again")
    convert.convert_weights(back, again, "pixio")
    for name, tensor in AutoModel.from_pretrained(again).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    inputs = AutoImageProcessor.from_pretrained(out)(images=list(images()), return_tensors="pt")["pixel_values"]
    pixels = (images() / 255 - np.array(back.config.data.mean)) / np.array(back.config.data.std)
    np.testing.assert_allclose(inputs.permute(0, 2, 3, 1), pixels, rtol=1e-5, atol=1e-5)
    assert "PixioModel.from_pretrained" in (out / "README.md").read_text()


@pytest.mark.parametrize("backbone", [False, True])
def test_theirs_in_our_hands(tmp_path: Path, backbone: bool):
    """Reads what `transformers` saved: adds the class tokens' positions to these, finds a backbone's encoder."""
    model = random_pixio(
        PixioBackbone if backbone else PixioModel,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=16,
        patch_size=4,
    )
    model.save_pretrained(tmp_path / "theirs")
    source = pretrained.open_pretrained(epath.Path(tmp_path / "theirs"))
    assert source.config.model.cls_tokens == 8
    assert_same_features(source, model.pixio if backbone else model)


def test_what_it_cannot_express(tmp_path: Path):
    """A decoder, a ratio that is no whole number, images that are not square: by name."""
    odd = {**SMALL, "model__mlp_ratio": 2.5, "model__image_size": (16, 8)}
    with pytest.raises(ConfigError) as caught:
        convert.convert_weights(in_memory(**odd), epath.Path(tmp_path / "out"), "pixio")
    for words in ("there is a decoder", "model.mlp_ratio=2.5 is no whole number", "are not square"):
        assert words in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_config_that_describes_no_model(tmp_path: Path):
    """Their defaults stand for what a file leaves out."""
    source = in_memory(**SMALL)
    convert.convert_weights(source, epath.Path(tmp_path / "w"), "pixio", encoder_only=True)
    path = tmp_path / "w" / "config.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in stored.items() if name != "n_cls_tokens"}))
    with pytest.raises(ValueError, match=r"cls_token: shape \(1, 4, 24\), expected \(1, 8, 24\)"):
        pretrained.open_pretrained(epath.Path(tmp_path / "w"))


def print_table() -> None:
    """Prints the largest differences from their features, relative to the largest of these, for several sizes."""
    for width, depth, heads, side, patch in ((24, 2, 3, 16, 4), (192, 12, 3, 64, 8), (768, 12, 12, 256, 16)):
        sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
        model = random_pixio(**sizes, image_size=side, patch_size=patch)
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            pairs = pairs_of_features(pretrained.open_pretrained(epath.Path(directory)), model)
        found = {kind: np.abs(ours - theirs).max() / np.abs(theirs).max() for kind, (ours, theirs) in pairs.items()}
        print(f"{width}d/{depth}/{heads}, {side} px, p{patch}: " + "  ".join(f"{k} {v:.1e}" for k, v in found.items()))


if __name__ == "__main__":
    print_table()
