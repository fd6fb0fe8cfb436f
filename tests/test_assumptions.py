"""What a file of weights leaves open is said by the user's config, or assumed in a line of the log, or an error.

Each cure that such a line or error names is followed here, and works.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from etils import epath
from ml_collections import ConfigDict

from configs import default
from mae_dist import config as config_lib
from mae_dist.errors import ConfigError, DataFault, StorageFault
from mae_dist.model import positions
from mae_dist.weights import convert, foreign, layouts, pretrained
from mae_dist.weights.compatible import check_fits
from tests.runs import run
from tests.trained import in_memory

# Widths and heads that are published, so that they can be assumed.
SHAPE = {
    "model__image_size": (8, 8),
    "model__embed_dim": 192,
    "model__depth": 1,
    "model__num_heads": 3,
    "model__mlp_ratio": 0.5,
    "model__decoder_embed_dim": 192,
    "model__decoder_num_heads": 3,
    "model__decoder_mlp_ratio": 0.5,
}
CLASSIFIER = {"task": "finetune", "classify__pool": "cls"}
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "module._orig_mod.", "student.backbone.")


@pytest.fixture(scope="module")
def source():
    return in_memory(**SHAPE)


@pytest.fixture(scope="module")
def tensors(source):
    return layouts.to_layout(source.load_whole(), source.config.model, "timm")


@pytest.fixture(scope="module")
def encoder_tensors(tensors):
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(("decoder", "mask"))}


def opened(path: Path, template: ConfigDict | None = None) -> pretrained.Pretrained:
    return pretrained.open_pretrained(epath.Path(path), template)


def stored(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    safetensors.numpy.save_file(tensors, path)
    return path


def assert_same(found: Any, wanted: Any) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, dict):
            assert_same(found[name], value)
        else:
            np.testing.assert_array_equal(found[name], value, name)


def follow(message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs the command that a message offers, and returns the file that it wrote."""
    monkeypatch.chdir(tmp_path)
    python, flag, code = shlex.split(message[message.index("python -c") :])[:3]
    assert (python, flag) == ("python", "-c")
    exec(code, {})
    return tmp_path / "OUT.safetensors"


# --- fields that names and shapes do not show

OTHERWISE = {  # for each field that may be assumed another value, which a config can say
    "model.num_heads": 4,
    "model.decoder_num_heads": 6,
    "model.image_size": (4, 16),
    "model.norm_eps": 1e-5,
    "model.gelu": "tanh",
    "model.masking": "block",
    "model.mask_ratio": 0.5,
    "pretrain.norm_pix_loss": True,
    "classify.pool": "gap",
    "data.mean": (0.1, 0.2, 0.3),
    "data.std": (0.3, 0.2, 0.1),
}


@pytest.mark.parametrize("kind", ["classifier", pytest.param("autoencoder", marks=pytest.mark.long)])
def test_each_assumption_is_said_and_its_cure_works(child_env, tmp_path, caplog, kind):
    made = in_memory(**SHAPE, **(CLASSIFIER if kind == "classifier" else {}))
    path = stored(tmp_path / "a.safetensors", layouts.to_layout(made.load_whole(), made.config.model, "timm"))
    found = opened(path).config
    lines = [record.getMessage() for record in caplog.records if "assuming" in record.getMessage()]
    options = [option for line in lines for option in re.findall(r"--config\.([\w.]+)=(\S+)", line)]
    fields = [field for field, value in options if value == "…"]
    expected = {"model.num_heads", "model.image_size", "model.norm_eps", "model.gelu", "data.mean", "data.std"}
    if kind == "classifier":
        expected |= {"classify.pool"}
    else:
        expected |= {"model.decoder_num_heads", "model.masking", "model.mask_ratio", "pretrain.norm_pix_loss"}
    assert (set(fields), len(fields)) == (expected, len(expected))
    assert all(str(path) in line for line in lines)
    assert all(f"{field}={config_lib.get(found, field)!r}" in "\n".join(lines) for field in fields)

    said = {field: OTHERWISE[field] if value == "…" else value for field, value in options}
    arguments = (f"--source={path}", f"--out={tmp_path}/w", "--to=mae_dist", "--config=configs/default.py")
    typed = [f"--config.{field}={value}" for field, value in said.items()]
    code, output = run(child_env(), *arguments, *typed, module="convert")
    assert code == 0, output
    assert "assuming" not in output
    found = config_lib.from_json((tmp_path / "w" / "config.json").read_text())
    for field in fields:
        assert config_lib.get(found, field) == OTHERWISE[field], field
        assert f"{field}={OTHERWISE[field]!r}" in output  # what was taken from the config is said, too


def test_the_rest_of_a_config_is_not_of_the_weights(tmp_path, tensors):
    """A fine-tuning's recipe describes no pretraining; its data, mesh and batch size go with the weights."""
    template = in_memory(
        **SHAPE, **CLASSIFIER, classify__mixup=0.8, optim__layer_decay=0.7, global_batch_size=48
    ).config
    found = opened(stored(tmp_path / "a.safetensors", tensors), template).config
    config_lib.validate(found)
    assert (found.task, found.classify.mixup, found.optim.layer_decay) == ("pretrain", 0, 1)
    assert (found.data, found.global_batch_size) == (template.data, 48)


def test_heads_of_two_readings(tmp_path, tensors):
    """Published ones by the file's width, a config's that is of another width: only the user knows."""
    path = stored(tmp_path / "a.safetensors", tensors)
    template = default.get_config()
    template.model.num_heads = template.model.decoder_num_heads = 4
    with pytest.raises(ConfigError, match=r"192 wide.* have 3 heads.*model\.num_heads=4 of model\.embed_dim=128"):
        opened(path, template)
    template.model.embed_dim = template.model.decoder_embed_dim = 192
    for heads in (3, 4):
        template.model.num_heads = heads
        assert opened(path, template).config.model.num_heads == heads


def test_positions_that_are_no_square(tmp_path, encoder_tensors):
    table = np.concatenate([encoder_tensors["pos_embed"], np.ones((1, 2, 192), np.float32)], axis=1)  # class and 6
    path = stored(tmp_path / "a.safetensors", {**encoder_tensors, "pos_embed": table})
    with pytest.raises(
        ConfigError, match=r"pos_embed has 7 rows, no square.*patches of \(4, 4\).*--config\.model\.image"
    ):
        opened(path)
    template = in_memory(**{**SHAPE, "model__image_size": (8, 12)}).config
    assert opened(path, template).config.model.image_size == (8, 12)


def test_a_class_token_without_a_row(tmp_path, source, encoder_tensors):
    """As timm's no_embed_class."""
    tensors = {**encoder_tensors, "pos_embed": encoder_tensors["pos_embed"][:, 1:]}
    found = opened(stored(tmp_path / "a.safetensors", tensors), source.config)
    assert_same(found.load_whole(), {"encoder": source.load_whole()["encoder"]})


def test_tokens_of_zero(tmp_path):
    """Constants or learned: as the config has it, and the run that begins from them asks for."""
    made = in_memory(**SHAPE, model__cls_token="zero", model__mask_token="zero")
    path = stored(tmp_path / "a.safetensors", layouts.to_layout(made.load_whole(), made.config.model, "timm"))
    for template in (made.config, None):
        found = opened(path, template)
        assert found.config.model.cls_token == found.config.model.mask_token == ("zero" if template else "learned")
    check_fits(opened(path, made.config).config, made.config, ("encoder", "decoder"))


def test_missing_scaling_of_hugging_face(tmp_path, source, caplog):
    convert.convert_weights(in_memory(**SHAPE), epath.Path(tmp_path / "hf"), "hf")
    file = tmp_path / "hf" / "preprocessor_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in content.items() if name != "image_mean"}))
    assert opened(tmp_path / "hf").config.data.mean == foreign.IMAGENET_MEAN
    assert "assuming data.mean=(0.485, 0.456, 0.406) and data.std" in caplog.text
    assert opened(tmp_path / "hf", source.config).config.data.mean == source.config.data.mean


# --- precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wide_file", [False, True])
def test_rounded_positions(tmp_path, source, tensors, caplog, dtype, wide_file):
    """Known as the fixed ones, also in a file that holds them as float32 again; a config may keep them as learned."""
    rounded = {name: torch.from_numpy(tensor.copy()).to(dtype) for name, tensor in tensors.items()}
    torch.save({name: t.float() if wide_file else t for name, t in rounded.items()}, tmp_path / "a.pth")
    found = opened(tmp_path / "a.pth", source.config)
    assert found.config.model.pos_embed == "sincos2d"
    check_fits(found.config, source.config, ("encoder", "decoder"))
    assert f"rounded to {str(dtype).removeprefix('torch.')}" in caplog.text
    assert "--config.model.pos_embed=learned keeps" in caplog.text
    template = source.config.copy_and_resolve_references().unlock()
    template.model.pos_embed = "learned"
    kept = opened(tmp_path / "a.pth", template.lock())
    table = kept.load_whole()["encoder"]["positions"]["embedding"]
    np.testing.assert_array_equal(table, rounded["pos_embed"].float().numpy()[0, 1:])
    check_fits(kept.config, template, ("encoder", "decoder"))


def test_positions_that_are_nearly_fixed_are_learned(tmp_path, source, tensors):
    """A changed table is kept; that the config says otherwise is an error, whose cure works."""
    table = tensors["pos_embed"] * np.float32(1 + 1e-5)
    path = stored(tmp_path / "a.safetensors", {**tensors, "pos_embed": table})
    found = opened(path, source.config)
    with pytest.raises(StorageFault, match=r"model\.pos_embed: 'learned' -> 'sincos2d'"):
        check_fits(found.config, source.config, ("encoder",))
    template = source.config.copy_and_resolve_references().unlock()
    template.model.pos_embed = "learned"
    check_fits(opened(path, template).config, template, ("encoder",))


# --- names


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes(tmp_path, source, tensors, caplog, prefix):
    path = stored(tmp_path / "a.safetensors", {prefix + name: tensor for name, tensor in tensors.items()})
    assert_same(opened(path, source.config).load_whole(), source.load_whole())
    assert f"taking the model whose names begin with {prefix!r}\n" in caplog.text


def test_what_stands_outside_a_prefix(tmp_path, source, encoder_tensors, caplog):
    inside = {f"backbone.{name}": tensor for name, tensor in encoder_tensors.items()}
    path = stored(tmp_path / "a.safetensors", {**inside, "n_averaged": np.ones(1), "neck.a": np.ones(2, np.float32)})
    assert_same(opened(path, source.config).load_whole(), {"encoder": source.load_whole()["encoder"]})
    assert "begin with 'backbone.', and leaving out what does not: 'n_averaged', 'neck.a'" in caplog.text


def test_prefixes_of_hugging_face(tmp_path, source):
    convert.convert_weights(in_memory(**SHAPE), epath.Path(tmp_path / "hf"), "hf")
    file = tmp_path / "hf" / "model.safetensors"
    stored(file, {f"_orig_mod.{name}": tensor for name, tensor in safetensors.numpy.load_file(file).items()})
    assert_same(opened(tmp_path / "hf").load_whole(), source.load_whole())


def test_two_models_in_a_file(tmp_path, monkeypatch, source, encoder_tensors):
    both = {f"student.{name}": tensor + 1 for name, tensor in encoder_tensors.items()}
    both |= {f"teacher.{name}": tensor for name, tensor in encoder_tensors.items()}
    path = stored(tmp_path / "it's $HOME.safetensors", both)
    with pytest.raises(DataFault, match=r"2 models, whose names begin with 'student\.', 'teacher\.'") as caught:
        opened(path, source.config)
    found = opened(follow(str(caught.value), tmp_path, monkeypatch), source.config)
    assert_same(found.load_whole(), {"encoder": source.load_whole()["encoder"]})


def test_several_sets_of_weights(tmp_path, monkeypatch, source, tensors, caplog):
    """`model` before others, aloud; of others the only one; of two, neither."""
    files = {name: torch.from_numpy(tensor.copy()) for name, tensor in tensors.items()}
    other = {**files, "norm.bias": files["norm.bias"] + 1}
    path = tmp_path / "a.pth"
    torch.save({"model": other, "model_ema": files, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, path)
    assert opened(path, source.config).load_whole()["encoder"]["norm"]["bias"][0] == other["norm.bias"][0]
    assert "taking the weights below 'model', not 'model_ema'; one of them is saved" in caplog.text
    found = opened(follow(caplog.records[0].getMessage(), tmp_path, monkeypatch), source.config)
    assert_same(found.load_whole(), source.load_whole())
    caplog.clear()
    torch.save({"ema": files, "epoch": 3}, path)
    assert_same(opened(path, source.config).load_whole(), source.load_whole())
    assert "taking the weights below 'ema'\n" in caplog.text
    torch.save({"teacher": files, "student": other}, path)
    with pytest.raises(DataFault, match="several sets of weights, 'teacher', 'student'") as caught:
        opened(path, source.config)
    found = opened(follow(str(caught.value), tmp_path, monkeypatch), source.config)
    assert_same(found.load_whole(), source.load_whole())


def test_part_that_is_not_there(tmp_path, tensors):
    from mae_dist.weights import files

    path = stored(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ConfigError, match=r"no name begins with 'teacher\.'; there are 'blocks"):
        files.extract(str(path), str(tmp_path / "b.safetensors"), prefix="teacher.")


def test_two_files_in_a_directory(tmp_path, caplog):
    convert.convert_weights(in_memory(**SHAPE), epath.Path(tmp_path / "hf"), "hf")
    torch.save({}, tmp_path / "hf" / "pytorch_model.bin")
    opened(tmp_path / "hf")
    assert "holds model.safetensors, pytorch_model.bin: reading the first" in caplog.text


# --- relatives


@pytest.mark.parametrize("affine", [False, True])
def test_linear_probe(tmp_path, source, encoder_tensors, caplog, affine):
    """The paper's: a BatchNorm without scale and bias and a linear layer, as one layer that gives the same logits."""
    torch.manual_seed(0)
    head = torch.nn.Sequential(torch.nn.BatchNorm1d(192, affine=affine, eps=1e-6), torch.nn.Linear(192, 5))
    head(torch.randn(64, 192) * 2 + 1)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    state = {f"head.{name}": tensor.detach().numpy() for name, tensor in head.state_dict().items()}
    found = opened(stored(tmp_path / "a.safetensors", {**encoder_tensors, **state}), source.config)
    assert (found.config.task, found.num_classes) == ("finetune", 5)
    features = torch.randn(7, 192)
    linear = found.load_whole()["head"]["linear"]
    wanted = head.eval()(features).detach().numpy()
    np.testing.assert_allclose(features.numpy() @ linear["kernel"] + linear["bias"], wanted, rtol=1e-4, atol=1e-4)
    assert_same(found.load_whole()["encoder"], source.load_whole()["encoder"])
    assert "assuming eps=1e-06 (as the paper's code)" in caplog.text


def as_beit(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With biases of queries and values alone, and LayerScale by BEiT's names."""
    result = dict(tensors)
    bias = result.pop("blocks.0.attn.qkv.bias")
    scales = {f"blocks.0.gamma_{i}": np.full(192, i, np.float32) for i in (1, 2)}
    return {**result, **scales, "blocks.0.attn.q_bias": bias[:192], "blocks.0.attn.v_bias": bias[384:]}


def test_biases_of_queries_and_values(tmp_path, source, encoder_tensors):
    found = opened(stored(tmp_path / "a.safetensors", as_beit(encoder_tensors)), source.config).load_whole()["encoder"]
    wanted = {**source.load_whole()["encoder"]}
    blocks = found["stack"]["blocks"]
    bias = wanted["stack"]["blocks"]["attn"]["qkv"]["bias"]
    np.testing.assert_array_equal(blocks["attn"]["qkv"]["bias"][:, [0, 2]], bias[:, [0, 2]])
    assert not blocks["attn"]["qkv"]["bias"][:, 1].any()
    assert (blocks["scale1"][0, 0], blocks["scale2"][0, 0]) == (1, 2)


def test_positions_that_the_program_computes(tmp_path, source, encoder_tensors, caplog):
    """No pos_embed: nothing says which, so that the config has to; relative ones no model here has."""
    tensors = as_beit(encoder_tensors)
    del tensors["pos_embed"]
    path = stored(tmp_path / "a.safetensors", tensors)
    learned = in_memory(**SHAPE, model__pos_embed="learned").config
    for template in (None, learned):
        with pytest.raises(ConfigError, match=r"no pos_embed .*--config\.model\.pos_embed=sincos2d or sincos1d"):
            opened(path, template)
    with caplog.at_level("INFO", logger="absl"):
        found = opened(path, source.config)
    assert found.config.model.pos_embed == "sincos2d"
    assert "the config says: model.num_heads=3" in caplog.text
    assert "model.pos_embed='sincos2d', model.image_size=(8, 8)" in caplog.text
    np.testing.assert_array_equal(
        positions.fixed_positions("sincos2d", (2, 2), 192), encoder_tensors["pos_embed"][0, 1:]
    )
    table = {"blocks.0.attn.relative_position_bias_table": np.ones((4, 3), np.float32)}
    with pytest.raises(DataFault, match=r"1 tensors of relative positions \(blocks\.0\.attn\.relative.*no model here"):
        opened(stored(tmp_path / "b.safetensors", {**tensors, **table}), source.config)


def test_a_classifier_of_hugging_face_without_its_head(tmp_path):
    """As ViTModel is saved, with a pooler: the encoder."""
    made = in_memory(**SHAPE, **CLASSIFIER)
    convert.convert_weights(made, epath.Path(tmp_path / "hf"), "hf")
    file = tmp_path / "hf" / "model.safetensors"
    bare = {name: t for name, t in safetensors.numpy.load_file(file).items() if not name.startswith("classifier")}
    bare = {name.removeprefix("vit."): tensor for name, tensor in bare.items()}
    stored(file, {**bare, "pooler.dense.weight": np.ones((192, 192), np.float32), "pooler.dense.bias": np.ones(192)})
    found = opened(tmp_path / "hf")
    assert found.config.task == "pretrain"
    assert_same(found.load_whole(), {"encoder": in_memory(**SHAPE, **CLASSIFIER).load_whole()["encoder"]})
