"""Every config of configs/ works, and everything that cannot is refused with the field, the value and the cure."""

import importlib
import json
import pkgutil
import sys
from typing import Any

import numpy as np
import pytest
from absl.testing import flagsaver
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

import configs
from configs import default
from mae_dist import cli
from mae_dist import config as config_lib
from mae_dist.config import fields
from mae_dist.errors import ConfigError

CONFIGS = sorted(
    module.name
    for module in pkgutil.iter_modules(configs.__path__)
    if hasattr(importlib.import_module(f"configs.{module.name}"), "get_config")
)
FIELDS = [field for field, _ in config_lib.flatten(default.get_config())]


def load(name: str) -> ConfigDict:
    return importlib.import_module(f"configs.{name}").get_config()


def make(**changes: Any) -> ConfigDict:
    """The default with changes; `model__depth=3` is the field model.depth."""
    config = default.get_config()
    with config.ignore_type():
        config.update_from_flattened_dict({field.replace("__", "."): value for field, value in changes.items()})
    return config


def numbers(fields: tuple[str, ...], *values: float) -> list[Any]:
    """(field, value) for each, the value in the field's own type; a whole number cannot be NaN or infinite."""
    pairs = []
    for field in fields:
        kind = type(config_lib.get(default.get_config(), field))
        pairs += [pytest.param(field, kind(v), id=f"{field}={v}") for v in values if kind is float or np.isfinite(v)]
    return pairs


def fault(**changes: Any) -> str:
    """What validate says."""
    with pytest.raises(ConfigError) as error:
        config_lib.validate(make(**changes))
    return str(error.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_works(name):
    """A config that is shipped and cannot start would be the first thing a user meets."""
    config = load(name)
    assert config.is_locked
    config_lib.validate(config)
    assert config.name == name
    assert {field for field, _ in config_lib.flatten(config)} == set(FIELDS)
    plan = config_lib.schedule(config, 40_000)
    assert 0 <= plan.warmup_steps < plan.total_steps


PAPER_MODELS = {  # size: embed_dim, depth, num_heads, patch
    "b16": (768, 12, 12, 16),
    "l16": (1024, 24, 16, 16),
    "h14": (1280, 32, 16, 14),
}
PAPER_PRETRAINING = {
    "task": "pretrain",
    "total_epochs": 800,
    "global_batch_size": 4096,
    "model.mask_ratio": 0.75,
    "model.masking": "random",
    "model.drop_path": 0,
    "pretrain.norm_pix_loss": True,
    "optim.name": "adamw",
    "optim.base_lr": 1.5e-4,
    "optim.b1": 0.9,
    "optim.b2": 0.95,
    "optim.weight_decay": 0.05,
    "optim.layer_decay": 1,
    "optim.warmup_epochs": 40,
    "data.augment": "crop_flip",
    "data.crop_scale": (0.2, 1),
    "data.randaug_magnitude": 0,
}
PAPER_FINETUNING = {
    "task": "finetune",
    "global_batch_size": 1024,
    "classify.head": "linear",
    "classify.pool": "gap",
    "classify.norm_after_pool": True,
    "classify.label_smoothing": 0.1,
    "classify.mixup": 0.8,
    "classify.cutmix": 1,
    "classify.mix_prob": 1,
    "classify.mix_switch_prob": 0.5,
    "classify.erase_prob": 0.25,
    "optim.name": "adamw",
    "optim.b1": 0.9,
    "optim.b2": 0.999,
    "optim.weight_decay": 0.05,
    "optim.warmup_epochs": 5,
    "data.augment": "crop_flip",
    "data.randaug_magnitude": 9,
    "data.randaug_std": 0.5,
    "data.randaug_layers": 2,
}
PAPER_FINETUNING_BY_SIZE = {  # size: base_lr, layer_decay, drop_path, epochs
    "b16": (5e-4, 0.65, 0.1, 100),
    "l16": (1e-3, 0.75, 0.2, 50),
    "h14": (1e-3, 0.75, 0.3, 50),
}
PAPER_PROBE = {
    "task": "probe",
    "total_epochs": 90,
    "global_batch_size": 16384,
    "model.drop_path": 0,
    "classify.head": "linear",
    "classify.pool": "cls",
    "classify.batch_norm": True,
    "classify.label_smoothing": 0,
    "classify.erase_prob": 0,
    "optim.name": "lars",
    "optim.base_lr": 0.1,
    "optim.momentum": 0.9,
    "optim.weight_decay": 0,
    "optim.warmup_epochs": 10,
    "data.augment": "crop_flip",
    "data.randaug_magnitude": 0,
}


def recipe(size: str, kind: str) -> dict[str, Any]:
    """What the paper says of a config of this size, by field: its tables 8 to 10, where they are silent its code."""
    dim, depth, heads, patch = PAPER_MODELS[size]
    model = {
        "image_size": (224, 224),
        "patch_size": (patch, patch),
        "embed_dim": dim,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": 4,
        "decoder_embed_dim": 512,
        "decoder_depth": 8,
        "decoder_num_heads": 16,
        "decoder_mlp_ratio": 4,
        "pos_embed": "sincos2d",
        "norm_eps": 1e-6,
        "gelu": "exact",
    }
    of_kind = {"": PAPER_PRETRAINING, "_finetune": PAPER_FINETUNING, "_linear": PAPER_PROBE}[kind]
    of_size = {}
    if kind == "_finetune":
        names = ("optim.base_lr", "optim.layer_decay", "model.drop_path", "total_epochs")
        of_size = dict(zip(names, PAPER_FINETUNING_BY_SIZE[size], strict=True))
    return {f"model.{name}": value for name, value in model.items()} | of_kind | of_size


@pytest.mark.parametrize("kind", ["", "_finetune", "_linear"])
@pytest.mark.parametrize("size", list(PAPER_MODELS))
def test_recipes_of_the_paper(size, kind):
    """A value that is off, or a part that is built but not switched on, costs days and shows in the last per cent."""
    config, expected = load(f"imagenet_vit_{size}{kind}"), recipe(size, kind)
    assert {field: config_lib.get(config, field) for field in expected} == expected


def test_there_are_configs():
    """Discovery that finds nothing would pass the test above."""
    assert {"default", "smoke", "quickstart", "cifar_small", "cifar_medium_probe"} <= set(CONFIGS)


def test_tables_name_real_fields():
    """A typo in a table of checks would check nothing."""
    sections = {field.rpartition(".")[0] for field in FIELDS}
    tables = (fields.POSITIVE, fields.NOT_NEGATIVE, fields.FRACTIONS, fields.PROBABILITIES)
    for table in (config_lib.CHOICES, *tables):
        assert set(table) <= set(FIELDS)
    assert set(config_lib.FREE) <= set(FIELDS) | sections


@pytest.mark.parametrize(("field", "value"), numbers(fields.POSITIVE, 0, -3, float("nan")))
def test_positive_fields(field, value):
    """Each of them divides something, or counts what must exist."""
    assert f"{field}={value} must be above 0" in fault(**{field: value})


@pytest.mark.parametrize(("field", "value"), numbers(fields.NOT_NEGATIVE, -1, float("inf")))
def test_fields_that_are_not_negative(field, value):
    """Zero means off; below it means nothing."""
    assert f"{field}={value} must not be negative" in fault(**{field: value})


@pytest.mark.parametrize(("field", "value"), numbers(fields.FRACTIONS, -0.1, 1.0, float("nan")))
def test_shares(field, value):
    """Each of them has 1 / (1 - share) somewhere."""
    assert f"{field}={value} must be at least 0 and below 1" in fault(**{field: value})


@pytest.mark.parametrize(("field", "value"), numbers(fields.PROBABILITIES, -0.1, 1.1, float("nan")))
def test_probabilities(field, value):
    """All of the images, or none, are shares too."""
    assert f"{field}={value} must be at least 0 and at most 1" in fault(**{field: value})


@pytest.mark.parametrize("field", list(config_lib.CHOICES))
def test_choices(field):
    """The message lists them and offers the nearest."""
    right = next(iter(config_lib.CHOICES[field]))
    message = fault(**{field: right + "x"})
    assert f"{field}={right + 'x'!r} is not one of {', '.join(config_lib.CHOICES[field])}." in message
    assert f"Did you mean {right!r}?" in message
    assert "Did you mean" not in fault(**{field: "qqqqqq"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__num_heads": 5},
            "model.num_heads=5 does not divide model.embed_dim=128; nearest that does: 4",
        ),
        (
            {"model__decoder_num_heads": 7},
            "model.decoder_num_heads=7 does not divide model.decoder_embed_dim=64; nearest that does: 8",
        ),
        ({"model__embed_dim": -3}, "model.embed_dim=-3 must be above 0"),
        (
            {"model__embed_dim": 130, "model__num_heads": 2},
            "model.embed_dim=130 is not a multiple of 4, which model.pos_embed='sincos2d' needs; "
            "nearest that 2 heads divide too: 128",
        ),
        (
            {"model__decoder_embed_dim": 7, "model__decoder_num_heads": 7, "model__pos_embed": "sincos1d"},
            "model.decoder_embed_dim=7 is not a multiple of 2",
        ),
        (
            {"model__predict_ratio": 0.5},
            "model.predict_ratio=0.5 is for model.decoder='cross': the full decoder's tokens attend to each other, so "
            "all of them are needed; set it to 1.0, or choose model.decoder='cross'",
        ),
        (
            {"model__predict_ratio": 0.01, "model__decoder": "cross"},
            "model.predict_ratio=0.01 predicts 0 of 48 removed patches; it must be at least one and at most all: "
            "choose 0.0209 to 1",
        ),
        ({"model__predict_ratio": 1.5, "model__decoder": "cross"}, "model.predict_ratio=1.5 predicts 72 of 48"),
        ({"model__predict_ratio": float("nan"), "model__decoder": "cross"}, "model.predict_ratio=nan predicts 0 of 48"),
        (
            {"model__fuse_blocks": True},
            "model.fuse_blocks is for model.decoder='cross'; set it to False, or choose that decoder",
        ),
        ({"model__patch_size": (5, 4)}, "patch_size 5 does not divide the image height 32 (model.image_size)"),
        ({"model__patch_size": (4, 5)}, "does not divide the image width 32 (model.image_size); nearest that does: 4"),
        ({"model__patch_size": (4,)}, "model.patch_size=(4,) must be two positive whole numbers, (height, width)"),
        ({"model__patch_size": (4, 4.5)}, "model.patch_size=(4, 4.5) must be two positive whole numbers"),
        ({"model__image_size": (32, 0)}, "model.image_size=(32, 0) must be two positive whole numbers"),
        ({"model__channels": 0}, "model.channels=0 must be at least 1; 1 is gray, 3 RGB, 4 RGBA"),
        ({"model__channels": 6, "pictures__channels": (3, 2, 6)}, "pictures.channels=(3, 2, 6) must be three numbers"),
        (
            {"data__labels": "csv"},
            "data.labels='csv' with data.source='tfds' is not one of none, folders, csv:FILE, cls",
        ),
        (
            {"data__source": "tar", "data__labels": "folders"},
            "data.labels='folders' with data.source='tar' is not one of none, cls",
        ),
        (
            {"data__source": "parquet", "data__labels": "column:"},
            "data.labels='column:' with data.source='parquet' is not one of none, column:NAME",
        ),
        ({"model__mask_ratio": 0.999}, "model.mask_ratio=0.999 keeps 0 of 64 patches; at least one must be kept"),
        ({"model__mask_ratio": 0.0}, "model.mask_ratio=0.0 keeps 64 of 64 patches"),
        ({"model__mask_ratio": float("nan")}, "model.mask_ratio=nan keeps 0 of 64 patches"),
        (
            {"model__masking": "grid", "model__mask_ratio": 0.6},
            "model.masking 'grid' cannot remove model.mask_ratio=0.6 of a 8x8 patch grid; ratios it can give: 0.015625",
        ),
        (
            {"model__mask_block": 3},
            "model.mask_block=3 does not divide the grid of 8x8 patches; choose 1 or 2 or 4",
        ),
        (
            {"model__cls_token": "zero", "model__cls_tokens": 4},
            "model.cls_tokens=4 and model.cls_token='zero': several differ only if they are learned",
        ),
        (
            {"task": "finetune", "classify__pool": "cls", "model__cls_tokens": 0},
            "classify.pool='cls' needs a class token and model.cls_tokens=0; use classify.pool='gap'",
        ),
        ({"model__mask_block": 8}, "model.mask_block=8 is the whole image"),
        (
            {"model__mask_block": 4, "model__mask_ratio": 0.9},
            "keeps 0 of 64 patches; at least one must be kept and one removed: choose 0.25 to 0.75, or a smaller "
            "model.mask_block than 4",
        ),
        ({"model__masking": "user"}, "model.mask_file '' cannot be read as a .npy array"),
        ({"accum_steps": 3}, "accum_steps=3 does not divide global_batch_size=256"),
        ({"total_epochs": 0.0, "optim__warmup_epochs": 0.0}, "total_epochs=0.0 must be above 0"),
        ({"total_epochs": 0.0, "optim__warmup_epochs": 0.0, "total_steps": 9}, "total_epochs=0.0 must be above 0"),
        ({"total_epochs": float("nan"), "total_steps": 9}, "total_epochs=nan must be above 0"),
        ({"total_epochs": 10.0}, "optim.warmup_epochs=20.0 is longer than total_epochs=10.0"),
        (
            {"checkpoint__every_steps": 0, "checkpoint__every_minutes": 0.0},
            "checkpoint.every_steps=0 and checkpoint.every_minutes=0: nothing would be saved",
        ),
        (
            {"checkpoint__every_steps": 200, "checkpoint__keep_every_steps": 350},
            "only multiples of 1400 would be kept; nearest that is: 400",
        ),
        (
            {"checkpoint__every_steps": 0, "checkpoint__keep_every_steps": 300},
            "nothing would be kept; set checkpoint.every_steps=300",
        ),
        ({"task": "probe"}, "task='probe' needs init_from=<workdir of a pretraining>"),
        (
            {"task": "probe", "init_from": "runs/x", "classify__norm_after_pool": True},
            "classify.norm_after_pool is for task='finetune'",
        ),
        ({"task": "finetune", "classify__batch_norm": True}, "classify.batch_norm is for task='probe'"),
        ({"classify__cutmix": 1.0}, "classify.cutmix=1.0 is for task='finetune' and task='pretrain'"),
        ({"optim__layer_decay": 0.75}, "optim.layer_decay=0.75 with task='pretrain': it must be at most 1"),
        ({"task": "finetune", "optim__layer_decay": 1.5}, "optim.layer_decay=1.5 with task='finetune': it must be at"),
        ({"task": "finetune", "classify__erase_prob": 1.5}, "classify.erase_prob=1.5 must be at least 0 and at most 1"),
        (
            {"task": "finetune", "classify__pool": "cls", "model__cls_token": "none"},
            "classify.pool='cls' needs a class token and model.cls_token='none'; use classify.pool='gap'",
        ),
        (
            {"data__mean": (0.5, 0.5)},
            "data.mean=(0.5, 0.5) has 2 values; needed: 1, or one for each of model.channels=3",
        ),
        ({"data__std": ()}, "data.mean=(0.0,) and data.std=(): both are () to be measured, or neither"),
        ({"data__std": (1.0, 0.0, 1.0)}, "data.std=(1.0, 0.0, 1.0) must be above 0"),
        ({"data__std": (float("nan"),)}, "data.std=(nan,) must be above 0"),
        ({"data__mean": (float("nan"),)}, "data.mean=(nan,) must be finite"),
        ({"data__crop_scale": (0.8, 0.2)}, "data.crop_scale=(0.8, 0.2) must be (low, high) with 0 < low <= high <= 1"),
        ({"data__crop_scale": (0.5,)}, "data.crop_scale=(0.5,) must be (low, high)"),
        (
            {"data__randaug_magnitude": 10.5, "data__augment": "flip"},
            "data.randaug_magnitude=10.5 must be at most 10",
        ),
        ({"data__randaug_magnitude": 9.0}, "data.randaug_magnitude=9.0 and data.augment='none'; RandAugment follows"),
        (
            {"data__randaug_magnitude": 9.0, "data__augment": "flip", "model__channels": 4},
            "data.randaug_magnitude=9.0 and model.channels=4: RandAugment's colours",
        ),
        (
            {"data__repeats": 3},
            "data.repeats=3 does not divide global_batch_size=256; nearest that does: 2; or global_batch_size=255",
        ),
        (
            {"checkpoint__keep_best": "val_los"},
            "checkpoint.keep_best='val_los' is not one of val_loss, val_knn_top1, val_ridge_top1 (or ''). "
            "Did you mean 'val_loss'?",
        ),
        (
            {"task": "finetune", "checkpoint__keep_best": "val_knn_top1"},
            "checkpoint.keep_best='val_knn_top1' is not one of val_loss, val_top1, val_top5 (or '').",
        ),
        (
            {"checkpoint__keep_best": "val_knn_top1", "online__every_epochs": 0.0},
            "checkpoint.keep_best='val_knn_top1' needs evaluations: set data.val_split and online.every_epochs",
        ),
        (
            {"classify__pool": "cls", "model__cls_token": "none"},
            "classify.pool='cls' needs a class token and model.cls_token='none'; use classify.pool='gap'",
        ),
        (
            {"checkpoint__keep_best": "val_loss", "data__val_split": ""},
            "checkpoint.keep_best='val_loss' needs evaluations: set data.val_split",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_work(changes, message):
    """Field, value, cure, before any device work."""
    assert message in fault(**changes)


def test_all_faults_are_listed_at_once():
    """One fault per start would cost a start each."""
    message = fault(model__num_heads=5, accum_steps=3, optim__name="adam", data__std=(0.0,), model__depth=0)
    assert message.startswith("config cannot work:\n  - ")
    assert message.count("\n  - ") == 5
    assert "Did you mean 'adamw'?" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "finetune", "model__mask_ratio": 0.999},
        {"task": "finetune", "checkpoint__keep_best": "val_top5"},
        {"model__masking": "grid", "model__mask_ratio": 0.5},
        {"model__decoder": "cross", "model__predict_ratio": 0.0209, "model__fuse_blocks": True},
        {"model__pos_embed": "learned", "model__embed_dim": 7, "model__num_heads": 7},
        {"data__mean": (0.1, 0.2, 0.3), "data__std": (0.1,)},
        {"total_steps": 7},
        {"checkpoint__every_steps": 0},
        {"checkpoint__every_steps": 200, "checkpoint__keep_every_steps": 600},
        {"checkpoint__every_steps": 200, "checkpoint__keep_every_steps": 50},
        {"checkpoint__every_steps": 0, "checkpoint__keep_every_steps": 300, "checkpoint__keep_best": "val_loss"},
        {"checkpoint__keep_best": "val_ridge_top1", "eval__every_epochs": 0.0},
        {"classify__pool": "cls", "model__cls_token": "none", "online__every_epochs": 0.0},
    ],
    ids=lambda value: " ".join(value),
)
def test_what_can_work(changes):
    """A check must not refuse what another task or option does not need."""
    config_lib.validate(make(**changes))


def test_user_mask_is_checked_against_the_grid(tmp_path):
    """The file is read at start, not at the first step."""
    path = tmp_path / "mask.npy"
    np.save(path, np.eye(8, dtype=np.int32))
    config_lib.validate(make(model__masking="user", model__mask_file=str(path)))
    message = fault(model__masking="user", model__mask_file=str(path), model__patch_size=(8, 8))
    assert "has shape (8, 8) and 8 removed patches; needed: shape (4, 4) or (16,)" in message


def parse(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> ConfigDict:
    """The config that a command line gives."""
    argv = ["main", "--config=configs/smoke.py", *arguments]
    monkeypatch.setattr(sys, "argv", argv)  # config_flags looks for overrides there
    with flagsaver.flagsaver():
        assert cli.parse_flags(argv) == ["main"]
        return cli.CONFIG.value


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of config_flags
def test_overrides(monkeypatch):
    """Strings of a command line become the types of the fields."""
    config = parse(
        monkeypatch,
        "--config.model.embed_dim=64",
        "--config.optim.base_lr=1",
        "--config.model.patch_size=(2, 2)",
        "--noconfig.model.qkv_bias",
    )
    assert (config.model.embed_dim, config.model.patch_size, config.model.qkv_bias) == (64, (2, 2), False)
    assert isinstance(config.optim.base_lr, float)
    config_lib.validate(config)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of config_flags
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.model.embed_dm=64", "no such field: 'embed_dm'\nDid you mean \"embed_dim\""),
        ("--config.modle.embed_dim=64", "no such field: 'modle'\nDid you mean \"model\""),
        ("--config.model.qqq=1", "the config has no such field: 'qqq'"),
        ("--config.model.embed_dim=wide", "flag --config.model.embed_dim=wide: invalid literal for int()"),
        ("--config.model.embed_dim=6.5", "flag --config.model.embed_dim=6.5: invalid literal for int()"),
        ("--config.model=3", "flag --config.model=3: "),
        ("--config.model.scan=perhaps", "perhaps"),
        ("--wrkdir=x", "Unknown command line flag 'wrkdir'. Did you mean: workdir ?"),
    ],
)
def test_overrides_that_cannot_be(monkeypatch, argument, message):
    """A misspelt override that is ignored costs a whole run."""
    with pytest.raises(ConfigError) as error:
        parse(monkeypatch, argument)
    assert message in str(error.value)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of config_flags
def test_config_file_that_is_not_there(monkeypatch):
    """One line with the path, not a traceback."""
    with pytest.raises(ConfigError, match=r"configs/no_such_file\.py"):
        parse(monkeypatch, "--config=configs/no_such_file.py")


@pytest.mark.parametrize("name", CONFIGS)
def test_json_round_trip(name):
    """What a workdir stores is the config that ran, tuples and all."""
    config = load(name)
    text = config_lib.to_json(config)
    assert json.loads(text)["name"] == name
    back = config_lib.from_json(text)
    assert back == config
    assert back.is_locked
    assert isinstance(back.model.patch_size, tuple)
    assert config_lib.to_json(back) == text
    assert config_lib.differences(config, back, ignore=()) == []


def test_stored_config_of_another_version():
    """A field added since is at its default, one removed since is dropped: old runs stay readable."""
    stored = json.loads(config_lib.to_json(make(model__depth=7)))
    del stored["model"]["gelu"], stored["pictures"]
    stored["model"]["rotary"] = True
    back = config_lib.from_json(json.dumps(stored))
    assert back == make(model__depth=7)


def test_from_json_leaves_the_default_alone():
    """A shared default that is changed by reading would leak into the next."""
    shared = default.get_config()
    config_lib.from_json(config_lib.to_json(make(model__depth=7)))
    assert shared == default.get_config()


def test_differences_ignore_how_and_where_a_run_is_done():
    """Another mesh continues a run; another width does not."""
    old = default.get_config()
    free = make(
        name="x",
        mesh__fsdp=2,
        accum_steps=2,
        total_steps=9,
        model__scan=True,
        model__remat="dots",
        data__data_dir="/elsewhere",
        eval__every_epochs=2.0,
        checkpoint__keep_best="val_loss",
    )
    assert config_lib.differences(old, free) == []
    assert len(config_lib.differences(old, free, ignore=())) == 9
    changed = make(model__embed_dim=64, optim__base_lr=0.5, data__mean=(0.5,), data__repeats=2)
    assert config_lib.differences(old, changed) == [
        "data.mean: [0.0] -> [0.5]",
        "data.repeats: 1 -> 2",
        "model.embed_dim: 128 -> 64",
        "optim.base_lr: 0.001 -> 0.5",
    ]
    stored = json.loads(config_lib.to_json(old))
    assert config_lib.differences(stored, old) == []
    del stored["model"]["gelu"]
    assert config_lib.differences(stored, old) == ["model.gelu: '(absent)' -> 'exact'"]


@pytest.mark.parametrize(
    ("began", "given", "same"),
    [
        ("runs/random", "/moved/random/", True),
        ("runs/random", "runs/grid", False),
        ("", "runs/grid", False),
        ("runs/random", "", False),
    ],
)
def test_other_weights_to_begin_from_are_another_run(began, given, same):
    """A probe of one encoder is not the result of another's; where the weights lie may change."""
    lines = config_lib.differences(make(init_from=began), make(init_from=given))
    assert lines == ([] if same else [f"init_from: {began!r} -> {given!r}"])


def test_schedule_counts_epochs_in_updates():
    """A hundred epochs of 40,000 images in batches of 256 are 15,625 updates, not 100 times a rounded epoch."""
    plan = config_lib.schedule(make(eval__every_epochs=2.0, pictures__every_steps=70), 40_000)
    assert plan.total_steps == 15_625
    assert plan.warmup_steps == 3_125
    assert plan.eval_every_steps == pytest.approx(312.5)
    assert plan.pictures_every_steps == 70
    never = config_lib.schedule(make(eval__every_epochs=0.0), 40_000)
    assert never.eval_every_steps == 0


def test_total_steps_shrinks_the_warm_up():
    """A short trial of a long recipe must not end inside its warm-up."""
    plan = config_lib.schedule(make(total_steps=50), 40_000)
    assert (plan.total_steps, plan.warmup_steps) == (50, 10)


def test_schedule_of_less_than_one_update():
    """Something always happens."""
    assert config_lib.schedule(make(total_epochs=0.001, optim__warmup_epochs=0.0), 100).total_steps == 1


def test_is_time():
    """At multiples, after the last update whatever it is, and never for 0."""
    assert [step for step in range(1, 11) if config_lib.is_time(step, 3, 10)] == [3, 6, 9, 10]
    assert not any(config_lib.is_time(step, 0, 10) for step in range(1, 11))
    assert [step for step in range(1, 11) if config_lib.is_time(step, 2.5, 10)] == [3, 5, 8, 10]
    assert [step for step in range(1, 4) if config_lib.is_time(step, 0.4, 3)] == [1, 2, 3]


@given(every=st.floats(1, 50), total=st.integers(1, 300))
def test_is_time_is_due_once_per_interval(every, total):
    """Epochs that are no whole number of updates must not drift."""
    due = [step for step in range(1, total + 1) if config_lib.is_time(step, every, total)]
    assert due[-1] == total
    assert abs(len(due) - total / every) <= 1
    for number, step in enumerate(due[:-1], start=1):
        assert number * every - 1e-9 <= step < number * every + 1 + 1e-9
