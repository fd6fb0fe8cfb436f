"""Trained weights wherever they come from: a run, converted weights, a Hugging Face directory, a timm state dict.

Shapes: B batch, H W C image, (gh, gw) grid, N tokens, D width.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from mae_dist import config as config_lib
from mae_dist import layouts, saved, tasks, weights
from mae_dist.errors import ConfigError, DataFault, StorageFault
from mae_dist.storage import naming_faults

Params = dict[str, Any]
# What the published weights were trained on. Said aloud where it has to be assumed.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Heads of the transformers known by their width, in files that do not say: 64 values each, but 80 in ViT-H.
_NUM_HEADS = {192: 3, 384: 6, 512: 16, 768: 12, 1024: 16, 1280: 16}
_GELUS = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A trained model, its parameters not read yet or still on the host.

    config: a whole config; `task` is `pretrain` for an encoder with or without its decoder, else `probe` or `finetune`.
    origin: what it is and where, for people.
    abstract: the shapes of the parameters there are, by group: `encoder` and maybe `decoder`, `head`.
    names_data: whether the config says which images it was trained on; foreign weights do not, without a template.
    load: a tree of shardings, of some of the parameters -> those; a `StorageFault` names what there is not.
    """

    config: ConfigDict
    origin: str
    abstract: Params
    names_data: bool
    load: Callable[[Params], Params]

    @property
    def num_classes(self) -> int:
        """Outputs of the head, 0 without one."""
        return self.abstract["head"]["linear"]["bias"].shape[0] if "head" in self.abstract else 0

    def load_here(self, shapes: Params) -> Params:
        """The parameters of `shapes`, a part of `abstract`, on this process's first device."""
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return self.load(jax.tree.map(lambda _: device, shapes))

    def load_whole(self) -> Params:
        """Every parameter as a NumPy array."""
        return jax.tree.map(np.asarray, self.load_here(self.abstract))


def open_pretrained(path: epath.Path, default: ConfigDict, template: ConfigDict | None = None) -> Pretrained:
    """Finds out what `path` is and describes it.

    Args:
      path: the workdir of a run, a directory that `convert` wrote, one in Hugging Face's layout (ViTMAE, ViT), or a
        `.pth` or `.safetensors` file in timm's.
      default: configs/default.py.
      template: a config for what the weights do not say: heads and scaling of pixels in timm's layout, data.

    Raises:
      DataFault: files that are damaged, hostile, or do not hold the model they describe.
      ConfigError: something that has to be said by `template`, or contradicts it.
      StorageFault: a path that is none of these.
    """
    if path.is_dir():
        stored = _read_json(path / "config.json")
        if stored is not None and "model_type" in stored:
            return _from_hugging_face(path, stored, default, template)
        return _from_workdir(path, default)
    if not path.exists():
        raise ConfigError(f"{path} does not exist; give a run's workdir, a directory of weights, or a file of them")
    return _from_timm(path, default, template)


def _read_json(path: epath.Path) -> dict[str, Any] | None:
    """The object in a file, or None if there is no such file."""
    if not path.exists():
        return None
    with naming_faults(path):
        data = path.read_bytes()
    try:
        value = json.loads(data)
        if not isinstance(value, dict):
            raise ValueError(f"a JSON object is expected, found {type(value).__name__}")
    except (ValueError, RecursionError) as error:
        raise DataFault(f"{path} is damaged: {error}; restore the file") from error
    return value


def _from_workdir(path: epath.Path, default: ConfigDict) -> Pretrained:
    config = saved.read_config(path, default)
    step, shapes = saved.param_shapes(path)
    num_classes = shapes["head"]["linear"]["bias"].shape[0] if "head" in shapes else 0
    abstract = tasks.abstract_params(config, num_classes)
    abstract = {group: tree for group, tree in abstract.items() if group in shapes}

    def load(shardings: Params) -> Params:
        return saved.load_params(path, _select(abstract, shardings, path), shardings)[1]

    return Pretrained(config, f"{path}, step {step}", abstract, True, load)


def _select(tree: Any, wanted: Any, origin: Any, name: str = "") -> Any:
    """The part of a tree of parameters that `wanted` has too; a `StorageFault` names what is not there."""
    if not isinstance(wanted, dict):
        return tree
    missing = [f"{name}{key}" for key in wanted if key not in tree]
    if missing:
        raise StorageFault(
            f"{origin} has no {', '.join(missing)}, which this model needs; a fine-tuned encoder lacks the last norm "
            "where classify.norm_after_pool is true, converted weights may lack the decoder"
        )
    return {key: _select(tree[key], value, origin, f"{name}{key}/") for key, value in wanted.items()}


def _from_hugging_face(
    path: epath.Path, stored: dict[str, Any], default: ConfigDict, template: ConfigDict | None
) -> Pretrained:
    if stored["model_type"] not in ("vit_mae", "vit"):
        raise DataFault(
            f"{path / 'config.json'}: model_type {stored['model_type']!r} is no masked autoencoder; it can be "
            "'vit_mae', or 'vit' for a classifier"
        )
    tensors = layouts.with_standard_names(weights.read_tensors(path))
    config = _copy(template if template is not None else default)
    with config.unlocked(), config.ignore_type():
        try:
            _describe_hugging_face(config, stored)
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise DataFault(f"{path / 'config.json'} does not describe a model: {error!r}") from error
        _set_scaling(config, path, template is not None)
    return _from_tensors(config, tensors, "hf", f"Hugging Face layout in {path}", template is not None)


def _copy(config: ConfigDict) -> ConfigDict:
    copy = config.copy_and_resolve_references()
    return copy.lock()


def _describe_hugging_face(config: ConfigDict, stored: dict[str, Any]) -> None:
    """Sets the fields of the model that a config.json of Hugging Face names."""

    def two(value: Any) -> tuple[int, int]:
        height, width = value if isinstance(value, (list, tuple)) else (value, value)
        return int(height), int(width)

    act = stored.get("hidden_act", "gelu")
    if act not in _GELUS:
        raise ValueError(f"hidden_act {act!r} is not one of {', '.join(_GELUS)}")
    if stored.get("attention_probs_dropout_prob"):
        logging.warning("attention_probs_dropout_prob is left out: dropout of attention weights is not supported")
    config.model.update(
        image_size=two(stored.get("image_size", 224)),
        patch_size=two(stored.get("patch_size", 16)),
        channels=int(stored.get("num_channels", 3)),
        embed_dim=int(stored.get("hidden_size", 768)),
        depth=int(stored.get("num_hidden_layers", 12)),
        num_heads=int(stored.get("num_attention_heads", 12)),
        mlp_ratio=_ratio(int(stored.get("intermediate_size", 3072)), int(stored.get("hidden_size", 768))),
        cls_token="learned",
        mask_token="learned",
        layer_scale_init=0.0,
        norm_eps=float(stored.get("layer_norm_eps", 1e-12)),
        dropout=float(stored.get("hidden_dropout_prob", 0.0)),
        drop_path=0.0,
        qkv_bias=bool(stored.get("qkv_bias", True)),
        gelu=_GELUS[act],
    )
    config.init_from = ""
    if stored["model_type"] == "vit":
        config.task = "finetune"
        config.classify.update(head="linear", pool="cls", norm_after_pool=False)
        return
    decoder_dim = int(stored.get("decoder_hidden_size", 512))
    config.task = "pretrain"
    config.pretrain.norm_pix_loss = bool(stored.get("norm_pix_loss", False))
    config.model.update(
        decoder_embed_dim=decoder_dim,
        decoder_depth=int(stored.get("decoder_num_hidden_layers", 8)),
        decoder_num_heads=int(stored.get("decoder_num_attention_heads", 16)),
        decoder_mlp_ratio=_ratio(int(stored.get("decoder_intermediate_size", 2048)), decoder_dim),
        mask_ratio=float(stored.get("mask_ratio", 0.75)),
        masking="random",
    )


def _ratio(hidden: int, dim: int) -> float:
    """The mlp_ratio whose int(dim * ratio) is `hidden`, also where the quotient is rounded down."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def _set_scaling(config: ConfigDict, path: epath.Path, has_template: bool) -> None:
    """Mean and std of the pixels from preprocessor_config.json, else from the template, else ImageNet's."""
    file = path / "preprocessor_config.json"
    stored = _read_json(file) if path.is_dir() else None
    if stored is not None:
        if not stored.get("do_rescale", True) or abs(stored.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
            raise DataFault(f"{file}: pixels are not scaled by 1/255 (do_rescale, rescale_factor), as here")
        normal = stored.get("do_normalize", True)
        config.data.mean = tuple(float(v) for v in stored.get("image_mean", IMAGENET_MEAN)) if normal else (0.0,)
        config.data.std = tuple(float(v) for v in stored.get("image_std", IMAGENET_STD)) if normal else (1.0,)
    elif not has_template:
        rgb = config.model.channels == 3
        config.data.mean, config.data.std = (IMAGENET_MEAN, IMAGENET_STD) if rgb else ((0.0,), (1.0,))
        logging.warning(
            "%s does not say how pixels are scaled: assuming mean %s and std %s; a config says it by data.mean and "
            "data.std",
            path,
            config.data.mean,
            config.data.std,
        )


def _from_timm(path: epath.Path, default: ConfigDict, template: ConfigDict | None) -> Pretrained:
    tensors = weights.read_tensors(path)
    if any(name.startswith(("vit.", "embeddings.")) for name in tensors):
        raise DataFault(
            f"{path} has Hugging Face's names; give the directory that also holds its config.json instead of the file"
        )
    kernel, table = tensors.get("patch_embed.proj.weight"), tensors.get("pos_embed")
    if kernel is None or table is None or kernel.ndim != 4 or table.ndim != 3:
        shown = ", ".join(list(tensors)[:5]) or "no tensor"
        raise DataFault(
            f"{path} is no vision transformer in timm's layout, which has patch_embed.proj.weight (D, C, ph, pw) and "
            f"pos_embed (1, N, D); it has {len(tensors)} tensors: {shown}, …"
        )
    config = _copy(template if template is not None else default)
    with config.unlocked(), config.ignore_type():
        _describe_timm(config, tensors, template is not None)
        _set_scaling(config, path, template is not None)
    return _from_tensors(config, tensors, "timm", f"timm layout in {path}", template is not None)


def _describe_timm(config: ConfigDict, tensors: layouts.Tensors, has_template: bool) -> None:
    """Sets the fields of the model that the tensors' names and shapes show."""

    def hidden(name: str, dim: int) -> float:
        return _ratio(tensors[name].shape[0], dim) if name in tensors else 1.0

    def heads(field: str, dim: int) -> int:
        if has_template:
            return config.model[field]
        if dim not in _NUM_HEADS:
            raise ConfigError(
                f"the file does not say model.{field} and a width of {dim} is none of the published ones; give "
                f"--config with it (and --config.model.{field}=…)"
            )
        return _NUM_HEADS[dim]

    def depth(prefix: str) -> int:
        numbers = {name.split(".")[1] for name in tensors if name.startswith(prefix)}
        return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)

    embed_dim, channels, *patch = tensors["patch_embed.proj.weight"].shape
    has_cls = "cls_token" in tensors
    length = tensors["pos_embed"].shape[1] - int(has_cls)
    side = math.isqrt(max(0, length))
    image_size = (side * patch[0], side * patch[1])
    if has_template:
        rows, columns = (s // p for s, p in zip(config.model.image_size, patch, strict=True))
        if rows * columns == length:
            image_size = (rows * patch[0], columns * patch[1])
    scale = tensors.get("blocks.0.ls1.gamma")
    config.model.update(
        image_size=image_size,
        patch_size=tuple(patch),
        channels=channels,
        embed_dim=embed_dim,
        depth=depth("blocks."),
        num_heads=heads("num_heads", embed_dim),
        mlp_ratio=hidden("blocks.0.mlp.fc1.weight", embed_dim),
        cls_token="learned" if has_cls else "none",
        mask_token="learned",
        layer_scale_init=0.0 if scale is None else 1.0,  # only whether there is one matters to trained weights
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
    )
    config.init_from = ""
    config.task = "pretrain"
    groups = layouts.groups_in(tensors, "timm")
    if "head" in groups:
        pooled = "fc_norm.weight" in tensors
        config.task = "finetune"
        config.classify.update(head="linear", pool="gap" if pooled else "cls", norm_after_pool=pooled)
    elif "decoder" in groups and "decoder_embed.weight" in tensors:
        dim = tensors["decoder_embed.weight"].shape[0]
        config.model.update(
            decoder_embed_dim=dim,
            decoder_depth=depth("decoder_blocks."),
            decoder_num_heads=heads("decoder_num_heads", dim),
            decoder_mlp_ratio=hidden("decoder_blocks.0.mlp.fc1.weight", dim),
        )


def _from_tensors(
    config: ConfigDict, tensors: layouts.Tensors, layout: str, origin: str, has_template: bool
) -> Pretrained:
    """Checks the tensors against the config that describes them, and turns them."""
    model, groups = config.model, layouts.groups_in(tensors, layout)
    grid = tuple(size // max(1, patch) for size, patch in zip(model.image_size, model.patch_size, strict=True))
    with config.unlocked():
        model.pos_embed = layouts.position_kind(tensors, layout, (grid[0], grid[1]), model.cls_token != "none")
    # Before anything of that depth is built: a description may claim any.
    if max(model.depth, model.decoder_depth) > len(tensors):
        raise DataFault(f"{origin}: {model.depth} blocks are described and there are only {len(tensors)} tensors")
    try:
        config_lib.validate(config)
    except ConfigError as error:
        raise DataFault(f"{origin}: the described model cannot be: {error}") from error
    head = tensors.get("classifier.weight" if layout == "hf" else "head.weight")
    abstract = tasks.abstract_params(config, head.shape[0] if head is not None and head.ndim else 1)
    if config.task == "pretrain":
        abstract = {group: abstract[group] for group in groups if group in abstract}
    try:
        params = layouts.from_layout(tensors, abstract, model, layout)
    except DataFault as error:
        raise DataFault(f"{origin}: {error}") from error

    def load(shardings: Params) -> Params:
        return jax.tree.map(jax.device_put, _select(params, shardings, origin), shardings)

    return Pretrained(config.lock(), origin, abstract, has_template, load)
