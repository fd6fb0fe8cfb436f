"""Weights into other layouts and back: nothing lost, nothing half done, nothing believed that a file claims."""

import functools
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
from etils import epath
from ml_collections import ConfigDict
from safetensors.torch import load_file, save_file
from transformers import ViTForImageClassification, ViTMAEForPreTraining, ViTMAEModel

from mae_dist.checkpoint import reader
from mae_dist.convert import _sizes
from mae_dist.errors import ConfigError, DataFault, StorageFault
from mae_dist.model import build as model_build
from mae_dist.model import masking, positions
from mae_dist.model.hooks import PLAIN
from mae_dist.tasks import losses
from mae_dist.weights import adapt, convert, files, foreign, layouts, pretrained
from mae_dist.weights.compatible import check_fits
from tests import QUICK
from tests.runs import run, smoke_config

torch.set_num_threads(1)
SMALL = {
    "model__image_size": (16, 16),
    "model__patch_size": (4, 4),
    "model__embed_dim": 24,
    "model__depth": 2,
    "model__num_heads": 3,
    "model__mlp_ratio": 2.5,
    "model__decoder_embed_dim": 16,
    "model__decoder_depth": 1,
    "model__decoder_num_heads": 2,
    "model__layer_scale_init": 0.0,
    "model__cls_token": "learned",
    "model__mask_token": "learned",
    "model__pos_embed": "sincos2d",
    "model__dropout": 0.0,
    "model__drop_path": 0.0,
}
NUM_CLASSES = 5


def config_of(**overrides: Any) -> ConfigDict:
    return smoke_config(**{**SMALL, **overrides})


def random_params(config: ConfigDict, seed: int = 0) -> Any:
    """Every parameter random, so that none can be confused with another."""
    rng = np.random.default_rng(seed)
    shapes = model_build.abstract_params(config, NUM_CLASSES)
    return jax.tree.map(lambda leaf: (rng.normal(size=leaf.shape) * 0.2).astype(np.float32), shapes)


def run_dir(path: Path, config: ConfigDict, params: Any) -> epath.Path:
    reader.save_params(epath.Path(path), config, params, "a test")
    return epath.Path(path)


def in_memory(config: ConfigDict, params: Any) -> pretrained.Pretrained:
    """As `open_pretrained` would describe a run of these."""
    config = config.copy_and_resolve_references().lock()
    return pretrained.Pretrained(
        config, "a test", model_build.abstract_params(config, NUM_CLASSES), True, lambda _: params
    )


def opened(path: Any, template: ConfigDict | None = None) -> pretrained.Pretrained:
    return pretrained.open_pretrained(epath.Path(path), template)


def largest_difference(a: Any, b: Any) -> float:
    """Over two trees of the same structure."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), a, b)))


# --- round trips

MODELS = {
    "plain": {},
    "learned positions, no qkv bias": {"model__pos_embed": "learned", "model__qkv_bias": False},
    "1-D positions, tanh": {"model__pos_embed": "sincos1d", "model__gelu": "tanh", "model__norm_eps": 1e-12},
    "gray, norm_pix": {"model__channels": 1, "pretrain__norm_pix_loss": True},
    "classifier": {"task": "finetune", "classify__pool": "cls"},
}
TIMM_ONLY = {
    "LayerScale": {"model__layer_scale_init": 0.1},
    "not square": {"model__image_size": (8, 16), "model__patch_size": (4, 2)},
    "no class token": {"model__cls_token": "none"},
    "pooled classifier": {"task": "finetune", "classify__norm_after_pool": True},
}


@pytest.mark.parametrize(
    ("layout", "name"),
    [("hf", name) for name in MODELS] + [("timm", name) for name in {**MODELS, **TIMM_ONLY}],
)
def test_ours_to_theirs_and_back(tmp_path, layout, name):
    """Every bit of every parameter, and the fields that the layout can say."""
    config = config_of(**{**MODELS, **TIMM_ONLY}[name])
    params = random_params(config)
    out = epath.Path(tmp_path / ("theirs" if layout == "hf" else "theirs.safetensors"))
    convert.convert_weights(in_memory(config, params), out, layout)
    back = opened(out, config)
    assert largest_difference(back.load_whole(), params) == 0
    groups = ["encoder"] if config.task == "finetune" else ["encoder", "decoder"]
    check_fits(back.config, config, groups)
    assert back.config.classify == config.classify or config.task == "pretrain"
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_run_converted_twice(tmp_path):
    """From the files of a run to files of the same kind."""
    config = config_of()
    params = random_params(config)
    source = opened(run_dir(tmp_path / "run", config, params))
    convert.convert_weights(source, epath.Path(tmp_path / "back"), "mae_dist")
    again = opened(tmp_path / "back")
    assert largest_difference(again.load_whole(), params) == 0
    assert again.config.model == config.model
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "run"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_theirs_to_ours_and_back(tmp_path, suffix):
    """A state dict as the paper's code has it, wrapped as it saves it."""
    config = config_of()
    tensors = layouts.to_layout(random_params(config), config.model, "timm")
    path = tmp_path / f"a{suffix}"
    if suffix == ".pth":
        torch.save({"model": {name: torch.from_numpy(t) for name, t in tensors.items()}, "epoch": 3}, path)
    else:
        safetensors.numpy.save_file(tensors, path)
    out = epath.Path(tmp_path / f"b{suffix}")
    convert.convert_weights(opened(path, config), out, "timm")
    back = files.read_tensors(out)
    assert back.keys() == tensors.keys()
    assert max(float(np.abs(back[name] - tensors[name]).max()) for name in tensors) == 0


def test_hugging_face_to_ours_and_back(hugging_face, tmp_path):
    """What `transformers` saved, in the names of its files: every bit."""
    convert.convert_weights(opened(hugging_face), epath.Path(tmp_path / "ours"), "mae_dist")
    convert.convert_weights(opened(tmp_path / "ours"), epath.Path(tmp_path / "theirs"), "hf")
    before, after = (ViTMAEForPreTraining.from_pretrained(path) for path in (hugging_face, tmp_path / "theirs"))
    assert before.state_dict().keys() == after.state_dict().keys()
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]), name
    described = [json.loads(Path(path, "config.json").read_text()) for path in (hugging_face, tmp_path / "theirs")]
    for field in ("hidden_size", "layer_norm_eps", "mask_ratio", "norm_pix_loss", "hidden_act", "intermediate_size"):
        assert described[0][field] == described[1][field], field


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that `transformers` itself saved."""
    path = tmp_path_factory.mktemp("hf") / "model"
    config = config_of(model__norm_eps=1e-12, model__mlp_ratio=2.0)
    convert.convert_weights(in_memory(config, random_params(config)), epath.Path(path.parent / "first"), "hf")
    ViTMAEForPreTraining.from_pretrained(path.parent / "first").save_pretrained(path)
    return path


@pytest.mark.parametrize("overrides", [{}, {"model__layer_scale_init": 0.3, "pretrain__norm_pix_loss": True}])
def test_transformers_gives_the_same_loss(tmp_path, overrides):
    """Ours in their hands; LayerScale, which they have not, is multiplied into the products before it."""
    config = config_of(**overrides)
    params = random_params(config)
    convert.convert_weights(in_memory(config, params), epath.Path(tmp_path / "hf"), "hf")
    theirs = ViTMAEForPreTraining.from_pretrained(tmp_path / "hf")
    rng = np.random.default_rng(1)
    images, noise = rng.random((3, 16, 16, 3), np.float32), rng.random((3, 16), np.float32)
    output = theirs(torch.from_numpy(images).permute(0, 3, 1, 2), noise=torch.from_numpy(noise))

    bind = model_build.functional(functools.partial(model_build.make_model, config, 0, PLAIN)).bind

    def loss(params: Any) -> jax.Array:
        ids_shuffle = jax.numpy.argsort(noise, axis=1).astype(np.int32)
        pred, true, mask = bind(params)(
            jax.numpy.asarray(images), ids_shuffle, masking.num_keep(16, config.model.mask_ratio), None
        )
        target = losses.normalize_patches(true) if config.pretrain.norm_pix_loss else true
        return losses.masked_pixel_loss(pred, target, mask).mean()

    ours = float(jax.jit(loss, compiler_options=QUICK)(jax.tree.map(jax.numpy.asarray, params)))
    assert output.loss.item() == pytest.approx(ours, rel=1e-5)


def test_encoder_only(tmp_path):
    """For a decoder or head that the layout has not, and for users who want the encoder."""
    config = config_of()
    params = random_params(config)
    convert.convert_weights(in_memory(config, params), epath.Path(tmp_path / "hf"), "hf", encoder_only=True)
    ViTMAEModel.from_pretrained(tmp_path / "hf")
    back = opened(tmp_path / "hf")
    assert set(back.abstract) == {"encoder"}
    assert largest_difference(back.load_whole(), {"encoder": params["encoder"]}) == 0


@pytest.mark.parametrize("values", [["0"], ["-8", "8"], ["eight"], ["8", "8", "8"]])
def test_sizes_that_are_none(values):
    with pytest.raises(ConfigError, match=r"--image_size=.*give one whole number above 0"):
        _sizes(values)


def test_what_a_layout_cannot_express(tmp_path):
    """By name, with the cure, and nothing is written."""
    for overrides, words in (
        ({"model__cls_token": "none"}, "no class token"),
        ({"model__cls_tokens": 4}, "there are 4 class tokens (model.cls_tokens), which only the pixio layout has"),
        ({"model__image_size": (8, 16)}, "not square"),
        ({"model__decoder": "cross"}, "its decoder is another (model.decoder='cross'), which has no counterpart"),
        ({"task": "finetune", "classify__norm_after_pool": True}, "head/norm/scale has no counterpart"),
        ({"task": "finetune", "classify__pool": "gap"}, "pools by 'gap'"),
        ({"task": "finetune", "classify__head": "mlp"}, "head/hidden/kernel has no counterpart"),
    ):
        config = config_of(**overrides)
        source, out = in_memory(config, random_params(config)), epath.Path(tmp_path / "out")
        with pytest.raises(ConfigError, match="--to=mae_dist expresses everything") as caught:
            convert.convert_weights(source, out, "hf")
        assert words in str(caught.value)
        assert not list(tmp_path.iterdir())
        if "--encoder_only" in str(caught.value):
            convert.convert_weights(source, out, "hf", encoder_only=True)
            shutil.rmtree(out)
        else:
            with pytest.raises(ConfigError, match=r"class token|last norm"):
                convert.convert_weights(source, out, "hf", encoder_only=True)
            assert not list(tmp_path.iterdir())


# --- a classifier in PyTorch, with timm's names and the paper's way of fine-tuning


def timm_classifier(tensors: dict[str, torch.Tensor], images: torch.Tensor, heads: int) -> torch.Tensor:
    """Logits by timm's vision transformer, written from its description: tensors by timm's names."""
    functional = torch.nn.functional

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-6)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    kernel = tensors["patch_embed.proj.weight"]
    x = functional.conv2d(images, kernel, tensors["patch_embed.proj.bias"], stride=kernel.shape[2:])
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([tensors["cls_token"].expand(len(x), -1, -1), x], dim=1) + tensors["pos_embed"]
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    for block in (f"blocks.{index}" for index in range(depth)):
        b, n, d = x.shape
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").reshape(b, n, 3, heads, d // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
        x = x + tensors.get(f"{block}.ls1.gamma", torch.ones(())) * linear(attended, f"{block}.attn.proj")
        hidden = functional.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + tensors.get(f"{block}.ls2.gamma", torch.ones(())) * linear(hidden, f"{block}.mlp.fc2")
    pooled = norm(x[:, 1:].mean(1), "fc_norm") if "fc_norm.weight" in tensors else norm(x, "norm")[:, 0]
    return linear(pooled, "head")


def our_logits(config: ConfigDict, params: Any, images: np.ndarray) -> np.ndarray:
    """By the task that fine-tunes, for scaled images."""
    bind = model_build.functional(functools.partial(model_build.make_model, config, NUM_CLASSES, PLAIN)).bind
    return np.asarray(jax.jit(lambda p: bind(p)(jax.numpy.asarray(images), None), compiler_options=QUICK)(params))


@pytest.mark.parametrize(
    "overrides",
    [
        {"classify__pool": "gap", "classify__norm_after_pool": True},
        {"classify__pool": "cls", "model__layer_scale_init": 0.2},
        {"classify__pool": "cls", "classify__batch_norm": True, "task": "probe", "init_from": "a run"},
    ],
)
def test_classifier_of_timm(tmp_path, overrides):
    """The paper's fine-tuning: a mean over patches, then a LayerNorm; or the class token after the last norm.

    A probe's BatchNorm becomes part of the product after it.
    """
    config = config_of(**{"task": "finetune", **overrides})
    params = random_params(config)
    if "batch_norm" in params:
        params["batch_norm"]["var"] = np.square(params["batch_norm"]["var"])
    images = np.random.default_rng(2).random((3, 16, 16, 3), np.float32)
    ours = our_logits(config, jax.tree.map(jax.numpy.asarray, params), images)
    out = epath.Path(tmp_path / "a.safetensors")
    convert.convert_weights(in_memory(config, params), out, "timm")
    theirs = timm_classifier(load_file(out), torch.from_numpy(images).permute(0, 3, 1, 2), config.model.num_heads)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-5)


def test_classifier_of_transformers(tmp_path):
    """Hugging Face's ViT on the class token."""
    config = config_of(task="finetune", classify__pool="cls")
    params = random_params(config)
    images = np.random.default_rng(2).random((3, 16, 16, 3), np.float32)
    convert.convert_weights(in_memory(config, params), epath.Path(tmp_path / "hf"), "hf")
    theirs = ViTForImageClassification.from_pretrained(tmp_path / "hf")
    logits = theirs(torch.from_numpy(images).permute(0, 3, 1, 2)).logits.detach().numpy()
    back = opened(tmp_path / "hf")
    assert back.num_classes == NUM_CLASSES
    np.testing.assert_allclose(our_logits(back.config, back.load_whole(), images), logits, rtol=1e-4, atol=1e-5)


# --- other sizes and channels


@pytest.mark.parametrize("pos_embed", ["sincos2d", "learned"])
def test_positions_at_another_size(pos_embed):
    """As the paper's code resizes them: PyTorch's bicubic interpolation of the grid, not of the sequence."""
    config = config_of(model__pos_embed=pos_embed, model__image_size=(12, 20))
    params = random_params(config)
    old = {
        group: params[group]["positions"]["embedding"]
        if pos_embed == "learned"
        else positions.fixed_positions(pos_embed, (3, 5), dim)
        for group, dim in (("encoder", 24), ("decoder", 16))
    }
    with config.unlocked():
        resized = adapt.resize_positions(params, config, (32, 8))
    assert config.model.pos_embed == "learned"
    assert config.model.image_size == (32, 8)
    for group, table in old.items():
        square = torch.from_numpy(table.reshape(1, 3, 5, -1)).permute(0, 3, 1, 2)
        wanted = torch.nn.functional.interpolate(square, size=(8, 2), mode="bicubic", align_corners=False)
        wanted = wanted.permute(0, 2, 3, 1).reshape(16, -1).numpy()
        np.testing.assert_allclose(resized[group]["positions"]["embedding"], wanted, atol=1e-5)
        assert jax.tree.structure(resized) == jax.tree.structure(
            model_build.abstract_params(config_of(model__pos_embed="learned"), 0)
        )


def test_same_grid_keeps_positions(tmp_path):
    """Asked for the size it has."""
    config = config_of()
    params = random_params(config)
    with config.unlocked():
        assert adapt.resize_positions(params, config, (16, 16)) is params
    assert config.model.pos_embed == "sincos2d"


@pytest.mark.parametrize(("old", "new"), [(3, 1), (1, 3), (3, 4)])
def test_channels(old, new):
    """Of an image that is equal in all channels, encoder and decoder say the same as before."""
    config = config_of(model__channels=old)
    params = random_params(config)
    images = np.random.default_rng(0).random((2, 16, 16, 1), np.float32)
    # What is the same in all channels on one side: a gray image must be predicted gray to be compared.
    pred = params["decoder"]["pred"]
    for name, value in pred.items():
        gray = value.reshape(*value.shape[:-1], -1, old).mean(-1, keepdims=True)
        pred[name] = np.repeat(gray, old, -1).reshape(value.shape)

    def predict(config: ConfigDict, params: Any) -> np.ndarray:
        bind = model_build.functional(functools.partial(model_build.make_model, config, 0, PLAIN)).bind
        ids = jax.numpy.tile(jax.numpy.arange(16, dtype=np.int32), (2, 1))
        x = jax.numpy.repeat(images, config.model.channels, -1)
        pred = jax.jit(lambda p: bind(p)(x, ids, 4, None)[0], compiler_options=QUICK)(params)
        return np.asarray(pred).reshape(2, 16, 16, -1)[..., :1]

    before = predict(config, params)
    with config.unlocked():
        adapted = adapt.adapt_channels(params, config, new)
    assert config.model.channels == new
    np.testing.assert_allclose(predict(config, adapted), before, atol=1e-5)


# --- what cannot be believed


def corrupt(tensors: dict[str, np.ndarray], kind: str) -> None:
    """Changes a good state dict in one way."""
    if kind == "missing":
        del tensors["blocks.1.norm2.bias"], tensors["decoder_pred.weight"]
    elif kind == "misshapen":
        tensors["blocks.0.attn.qkv.weight"] = tensors["blocks.0.attn.qkv.weight"].T.copy()
    elif kind == "unknown":
        tensors["pooler.dense.weight"] = np.ones((2, 3), np.float32)
    elif kind == "nan":
        tensors["norm.weight"][3] = np.nan
    elif kind == "integers":
        tensors["norm.weight"] = np.ones(24, np.int32)
    elif kind == "half a decoder":
        for name in [name for name in tensors if name.startswith("decoder_blocks")]:
            del tensors[name]
    elif kind == "position of the class token in the decoder":
        tensors["decoder_pos_embed"][0, 0] = 1


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", ["blocks.1.norm2.bias: missing; expected shape (24,)", "decoder_pred.weight: missing"]),
        ("misshapen", ["blocks.0.attn.qkv.weight: shape (24, 72), expected (72, 24)"]),
        ("unknown", ["pooler.dense.weight: shape (2, 3), belongs to nothing here"]),
        ("nan", ["norm.weight: 1 of 24 values are not finite"]),
        ("integers", ["norm.weight: int32 values"]),
        ("half a decoder", ["decoder"]),
        ("position of the class token in the decoder", ["decoder_pos_embed: row 0 is not zero"]),
    ],
)
def test_state_dict_that_does_not_fit(tmp_path, kind, words):
    """Everything that is wrong is listed, in one error."""
    config = config_of()
    tensors = layouts.to_layout(random_params(config), config.model, "timm")
    corrupt(tensors, kind)
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(DataFault) as caught:
        opened(tmp_path / "a.safetensors", config)
    for word in words:
        assert word in str(caught.value)


def test_class_token_with_a_position(tmp_path):
    """timm's own models learn one: added to the token it is the same function."""
    config = config_of(task="finetune", classify__pool="cls")
    params = random_params(config)
    tensors = layouts.to_layout(params, config.model, "timm")
    tensors["pos_embed"] = tensors["pos_embed"] + np.random.default_rng(3).normal(size=tensors["pos_embed"].shape)
    tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    source = opened(tmp_path / "a.safetensors", config)
    images = np.random.default_rng(2).random((3, 16, 16, 3), np.float32)
    torch_tensors = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    theirs = timm_classifier(torch_tensors, torch.from_numpy(images).permute(0, 3, 1, 2), 3)
    ours = our_logits(source.config, source.load_whole(), images)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-5)


def test_another_architecture(tmp_path):
    """A ResNet, a Hugging Face file without its config, heads nobody can know."""
    save_file({"conv1.weight": torch.ones(4, 3, 7, 7), "bn1.weight": torch.ones(4)}, tmp_path / "a.safetensors")
    with pytest.raises(DataFault, match=r"no vision transformer in timm's layout.*'?conv1|bn1"):
        opened(tmp_path / "a.safetensors")
    save_file({"vit.embeddings.cls_token": torch.ones(1, 1, 4)}, tmp_path / "b.safetensors")
    with pytest.raises(DataFault, match=r"config\.json instead of the file"):
        opened(tmp_path / "b.safetensors")
    config = config_of()
    safetensors.numpy.save_file(
        layouts.to_layout(random_params(config), config.model, "timm"), tmp_path / "c.safetensors"
    )
    with pytest.raises(ConfigError, match=r"does not say model\.num_heads and a width of 24.*--config"):
        opened(tmp_path / "c.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "bert"}, "model_type 'bert'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"num_hidden_layers": 10**12}, "blocks are described"),
        ({"num_hidden_layers": "many"}, "does not describe a model"),
        ({"num_hidden_layers": 3}, "vit.encoder.layer.2.layernorm_before.weight: missing"),
        ({"num_hidden_layers": 1}, "belongs to nothing here"),
        ({"hidden_size": 10**9, "num_attention_heads": 1}, "expected ("),
        ({"hidden_size": 0}, "does not describe a model"),
        ({"image_size": [10**9, 10**9]}, "expected ("),
        ({"image_size": {}}, "does not describe a model"),
        ({"patch_size": 5}, "does not divide"),
        ({"patch_size": 0}, "cannot be"),
        ({"num_channels": 2}, "the tensors do not fit the model"),
        ({"num_attention_heads": 5}, "does not divide"),
        ({"mask_ratio": 2}, "mask_ratio"),
        ({"layer_norm_eps": "nan"}, "norm_eps"),
        ({"intermediate_size": 49}, "intermediate.dense.weight: shape"),
    ],
)
def test_config_that_lies(hugging_face, tmp_path, change, words):
    """A description may claim anything; it is compared with the tensors before anything of that size is made."""
    path = tmp_path / "hf"
    path.mkdir()
    (path / "model.safetensors").symlink_to(hugging_face / "model.safetensors")
    (path / "config.json").write_text(json.dumps({**json.loads((hugging_face / "config.json").read_text()), **change}))
    with pytest.raises((DataFault, ConfigError), match=re.escape(words)):
        opened(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00", "[" * 10**5])
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_json_that_is_none(hugging_face, tmp_path, name, content):
    path = tmp_path / "hf"
    path.mkdir()
    for file in ("model.safetensors", "config.json"):
        (path / file).symlink_to(hugging_face / file)
    (path / name).unlink(missing_ok=True)
    (path / name).write_text(content)
    with pytest.raises(DataFault, match=rf"{name} is corrupted"):
        opened(path)


def test_scaling_of_pixels(hugging_face, tmp_path, caplog):
    """Told by preprocessor_config.json, assumed aloud without it, and what is not 1/255 is refused."""
    assert opened(hugging_face).config.data.mean == foreign.IMAGENET_MEAN
    assert "assuming" in caplog.text
    config = config_of(data__mean=(0.5, 0.4, 0.3), data__std=(0.2,))
    out = epath.Path(tmp_path / "hf")
    convert.convert_weights(in_memory(config, random_params(config)), out, "hf")
    found = opened(out).config
    assert found.data.mean == (0.5, 0.4, 0.3)
    assert found.data.std == (0.2, 0.2, 0.2)
    stored = json.loads((out / "preprocessor_config.json").read_text())
    (out / "preprocessor_config.json").write_text(json.dumps({**stored, "rescale_factor": 1.0}))
    with pytest.raises(DataFault, match="not scaled by 1/255"):
        opened(out)


def test_what_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        opened(tmp_path / "none")
    with pytest.raises(StorageFault, match=r"no config\.json"):
        opened(tmp_path)


# --- the command


class Harm:
    """Pickles as a command."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_hostile_pickle_is_refused(child_env, tmp_path):
    """One message, the code of bad data, nothing run and nothing left."""
    config = config_of()
    tensors = layouts.to_layout(random_params(config), config.model, "timm")
    content = {"model": {name: torch.from_numpy(t) for name, t in tensors.items()}}
    torch.save({**content, "args": Harm(f"touch {tmp_path}/harm")}, tmp_path / "a.pth")
    code, output = run(child_env(), f"--source={tmp_path}/a.pth", f"--out={tmp_path}/out", "--to=hf", module="convert")
    assert code == 3, output
    assert "posix.system" in output
    assert "nothing of it was run" in output
    assert "Traceback" not in output
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.long
def test_command(child_env, tmp_path):
    """From a run to Hugging Face's layout at another size, in gray, and what it says."""
    config = config_of()
    run_dir(tmp_path / "run", config, random_params(config))
    arguments = (f"--source={tmp_path}/run", f"--out={tmp_path}/hf", "--to=hf")
    code, output = run(child_env(), *arguments, "--image_size=24", "--channels=1", module="convert")
    assert code == 0, output
    assert f"{tmp_path}/run, step 0 -> {tmp_path}/hf: encoder and decoder, " in output
    found = opened(tmp_path / "hf").config.model
    assert (found.image_size, found.channels, found.pos_embed) == ((24, 24), 1, "learned")
    code, output = run(child_env(), *arguments, module="convert")
    assert (code, "exists already" in output) == (2, True), output
