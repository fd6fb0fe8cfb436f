"""Every shipped config begins from every kind of weights that the guides name, and really trains on from them.

One cell is one recipe and one kind of source: the source is opened as the command opens it, checked, read and put in
place, its weights are compared with those that were written, and two updates are done. So that this takes seconds,
models are tiny, batches are drawn in memory, and configs that are one program but for constants (b16, l16 and h14; a
fine-tuning and the same from scratch) are one recipe: the cell's name lists them, and each is validated as it is.
"""

import dataclasses
import functools
import importlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from configs import default
from mae_dist import config as config_lib
from mae_dist.data import ArrayDataset
from mae_dist.data.from_config import Data
from mae_dist.model import build as model_build
from mae_dist.training import job
from mae_dist.weights import adapt, convert, pretrained
from tests import NO_PARITY, QUICK
from tests.trained import save

CONFIGS = sorted(
    path.stem
    for path in (Path(__file__).resolve().parent.parent / "configs").glob("*.py")
    if path.stem not in ("__init__", "recipes")
)
SOURCES = {  # how a source is made of a run: the layout, and whether without its decoder
    "run": ("mae_dist", False),
    "mae_dist": ("mae_dist", True),
    "hf": ("hf", False),
    "hf_encoder": ("hf", True),
    "timm.safetensors": ("timm", False),
    "timm_encoder.safetensors": ("timm", True),
    "timm.pth": ("timm", False),
    "hf_classifier": ("hf", False),
}
NUM_CLASSES = 10
SHORT = {"cifar_small", "cifar_small_probe", "cifar_small_finetune"}  # all other recipes are run by --long
# What a recipe is, once its model is tiny: other fields are lengths, rates, intervals and places.
_RECIPE = (
    *("task", "model.cls_token", "model.pos_embed", "model.layer_scale_init", "model.dtype", "model.scan"),
    *("model.channels", "pretrain", "classify", "ema_decay", "optim.name", "data.augment", "data.mean", "data.std"),
)


def tiny(name: str) -> ConfigDict:
    """A shipped config with the smallest model and batch, and no data set."""
    config = importlib.import_module(f"configs.{name}").get_config()
    with config.unlocked():
        config.model.update(image_size=(8, 8), patch_size=(4, 4), embed_dim=8, depth=1, num_heads=2, mlp_ratio=1.0)
        config.model.update(decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2, decoder_mlp_ratio=1.0)
        # Other layouts than Pixio's have one class token; see test_pixio.
        config.model.update(mask_ratio=0.5, mask_block=1, cls_tokens=1)
        config.global_batch_size, config.eval.batch_size = 4, 0
        config.data.update(source="synthetic", num_examples=8, num_workers=0)
        if not config.data.mean:  # that of the images, or of the weights
            config.data.update(mean=(0.4,), std=(0.2,))
    return config.unlock()


def weights_of(config: ConfigDict, seed: int) -> pretrained.Pretrained:
    """A trained model for a config, in memory."""
    config, rng = config.copy_and_resolve_references().lock(), np.random.default_rng(seed)
    abstract = model_build.abstract_params(config, NUM_CLASSES)
    params = jax.tree.map(lambda leaf: rng.normal(scale=0.3, size=leaf.shape).astype(np.float32), abstract)
    return pretrained.Pretrained(config, "a test", abstract, True, lambda _: params)


def pretraining_of(config: ConfigDict) -> ConfigDict:
    """The run that this config begins from: the same model, by the default recipe."""
    run = default.get_config().unlock()
    run.model, run.pretrain = config.model.copy_and_resolve_references(), config.pretrain
    run.update(data={name: config.data[name] for name in ("mean", "std")}, model={"drop_path": 0.0})
    return run.copy_and_resolve_references().lock()


@pytest.fixture(scope="module", autouse=True)
def shapes_once():
    """Remembers the shapes of a model's parameters, which every opening traces the model for."""
    compute = model_build.abstract_params

    @functools.cache
    def remembered(described: str, num_classes: int) -> Any:
        return compute(config_lib.from_json(described), num_classes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_build, "abstract_params", lambda config, n: remembered(config_lib.to_json(config), n))
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """`source(config, kind)`: (path, what was written there), made once for all configs of the same model."""
    root = tmp_path_factory.mktemp("sources")

    @functools.cache
    def make(described: str, kind: str) -> tuple[Path, Any]:
        config = config_lib.from_json(described)
        path = root / f"{len(list(root.iterdir()))}" / kind
        path.parent.mkdir()
        if kind == "hf_classifier":
            with config.unlocked():
                config.task, config.classify.pool = "finetune", "cls"
        model = weights_of(config, seed=len(kind))
        params = model.load_whole()
        if kind == "run":
            save(path, model)
        else:
            to, encoder_only = SOURCES[kind]
            convert.convert_weights(model, epath.Path(path), to, encoder_only=encoder_only)
        return path, params

    return lambda config, kind: make(config_lib.to_json(pretraining_of(config)), kind)


def recipe(config: ConfigDict) -> ConfigDict:
    """What matters of a config, all else by default."""
    result = default.get_config().unlock()
    for field in ("model", *_RECIPE):
        section, _, key = field.rpartition(".")
        (config_lib.get(result, section) if section else result)[key] = config_lib.get(config, field)
    result.init_from = "somewhere"
    result.update(global_batch_size=4, model={"drop_path": 0.1}, eval={"batch_size": 4})
    result.optim.layer_decay = 0.75 if config.task == "finetune" else 1.0
    result.classify.update({name: min(config.classify[name], 0.5) for name in ("mix_prob", "erase_prob")})
    return result.copy_and_resolve_references().lock()


def _recipes() -> list[Any]:
    """The names of the configs of each recipe."""
    found: dict[str, list[str]] = {}
    for name in CONFIGS:
        found.setdefault(config_lib.to_json(recipe(tiny(name))), []).append(name)
    return [
        pytest.param(names, id="+".join(names), marks=[] if SHORT & set(names) else pytest.mark.long)
        for names in found.values()
    ]


@pytest.fixture(scope="module")
def built():
    """`built(config)`: the job of its recipe, a batch of it and the update, compiled once."""

    @functools.cache
    def make(described: str) -> tuple[job.Job, Any, Any]:
        config = config_lib.from_json(described)
        rng, shape = np.random.default_rng(0), (*config.model.image_size, config.model.channels)
        images, labels = rng.integers(0, 256, (8, *shape), np.uint8), rng.integers(0, NUM_CLASSES, 8)
        data = ArrayDataset({"image": images, "label": labels.astype(np.int32)}, num_classes=NUM_CLASSES)
        made = job.build(config, jax.devices()[:1], Data(data, data, None))
        batch = {
            name: jax.device_put(
                rng.normal(size=value.shape).astype(np.float32)
                if name == "features"
                else {"image": images, "label": labels.astype(np.int32)}[name][: value.shape[0]],
                value.sharding,
            )
            for name, value in made.abstract_batch.items()
        }
        with jax.set_mesh(made.mesh):
            lowered = made.train_step.lower(made.abstract_state, batch)
        update = made.train_step.compiled(lowered, compiler_options=QUICK)
        return made, batch, update

    return lambda config: make(config_lib.to_json(recipe(config)))


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("names", _recipes())
def test_begins_from(source, built, names, kind):
    if kind.endswith(".pth"):
        pytest.importorskip("torch", reason=NO_PARITY)
    configs = [tiny(name) for name in names]
    path, written = source(configs[0], kind)
    for config in configs:
        config.init_from = str(path)
        config_lib.validate(config)
    config = configs[0]
    made, batch, update = built(config)
    made = dataclasses.replace(made, config=config)
    with jax.set_mesh(made.mesh):
        state = made.init_state()
        check_loaded(config, state.params, written, kind)
        for _ in range(2):
            state, metrics = update(state, batch)
    assert int(state.step) == 2
    assert np.isfinite(float(metrics["loss"]))


def check_loaded(config: ConfigDict, params: Any, written: Any, kind: str) -> None:
    """Every parameter of the encoder, and of a pretraining's decoder, is the one that was written."""
    if config.model.layer_scale_init and kind.startswith("hf"):  # folded by convert, ones here
        copy = config.copy_and_resolve_references().unlock()
        blocks = written["encoder"]["stack"]["blocks"]
        ones = {scale: np.ones_like(blocks[scale]) for scale in ("scale1", "scale2")}
        written = adapt.fold_layer_scale({group: written[group] for group in written if group != "head"}, copy)
        for group in written:
            written[group]["stack"]["blocks"] |= ones
    has_decoder = config.task == "pretrain" and "encoder" not in kind and kind not in ("mae_dist", "hf_classifier")
    for group in ("encoder", "decoder")[: 1 + has_decoder]:
        for place, leaf in jax.tree_util.tree_leaves_with_path(params[group]):
            wanted = written[group]
            for key in place:
                wanted = wanted[key.key]
            np.testing.assert_array_equal(leaf, wanted)
