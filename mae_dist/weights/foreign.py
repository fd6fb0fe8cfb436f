"""Configs for foreign weights: from Hugging Face's config.json, or from names and shapes in a file of timm's layout.

A field that neither decides is taken from the config that the user gives, or assumed, and logged.
"""

import math
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from mae_dist import config as config_lib
from mae_dist.config import default
from mae_dist.errors import ConfigError, DataFault
from mae_dist.model import patches, positions
from mae_dist.task_kinds import kind_of
from mae_dist.weights import files, hugging_face, layouts

# What the published weights were trained on.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Heads of the published transformers by their width: 64 values each, but 80 in ViT-H and 32 in the paper's decoder.
_NUM_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
_DECODER_NUM_HEADS = {**_NUM_HEADS, 512: 16}
# Sections and fields of a user's config that a description starts from. The others are of the user's own training,
# which may be of another task than the weights.
_TAKEN = ("model", "pretrain", "data", "eval", "global_batch_size", "mesh", "cpu")


class Description:
    """A config that describes foreign weights, as far as it is filled in.

    Attributes:
      config: unlocked; the sections `_TAKEN` of the user's config, all else by default.
      origin: what is described, for messages.
      template: the user's config, if there is one.
    """

    def __init__(self, origin: str, template: ConfigDict | None):
        self.origin, self.template = origin, template
        self.config = default.get_config().unlock()
        if template is not None:
            given = template.copy_and_resolve_references()
            with self.config.ignore_type():
                for field in _TAKEN:
                    self.config[field] = given[field]
        self.config.unlock()
        # Other layouts know no other decoder, whatever the user's own training has.
        self.update("model", decoder="full", fuse_blocks=False, predict_ratio=1.0)

    def update(self, section: str, **fields: Any) -> None:
        """Sets fields that the description gives."""
        with self.config.ignore_type():
            self.config[section].update(fields)

    def leave_open(
        self, why: str, assumed: dict[str, Any], *, ask_template: bool = True, also: dict[str, Any] | None = None
    ) -> None:
        """Sets fields, by dotted name, that the description does not give: as the template does, or as assumed.

        `also`: further fields that a config needs for its value to count.
        """
        template = self.template if ask_template else None
        values = assumed if template is None else {field: config_lib.get(template, field) for field in assumed}
        with self.config.ignore_type():
            self.config.update_from_flattened_dict(values)
        shown = [f"{field}={value!r}" for field, value in values.items()]
        if template is not None:
            logging.info("%s leaves open, and the config says: %s", self.origin, ", ".join(shown))
            return
        options = [f"--config.{k}={v}" for k, v in (also or {}).items()] + [f"--config.{k}=…" for k in assumed]
        self.assume(f"{' and '.join(shown)} ({why})", f"a config says it: --config F {' '.join(options)}")

    def assume(self, what: str, cure: str) -> None:
        """Logs an assumption and how to avoid it."""
        logging.warning("%s leaves open: assuming %s; %s", self.origin, what, cure)


def describe_hugging_face(description: Description, stored: dict[str, Any], tensors: layouts.Tensors) -> None:
    """Sets the fields of the model that a config.json of Hugging Face names.

    Raises:
      KeyError, TypeError, ValueError, ArithmeticError: it describes no model.
    """
    if stored.get("attention_probs_dropout_prob"):
        logging.warning("attention_probs_dropout_prob is left out: dropout of attention weights is not supported")
    kind = stored["model_type"]
    fixed = {"cls_token": "learned", "mask_token": "learned", "layer_scale_init": 0.0, "drop_path": 0.0}
    description.update("model", **hugging_face.read(stored, kind), **fixed)
    if kind == "vit_mae":
        description.update("model", masking="random")
        description.update("pretrain", norm_pix_loss=bool(stored.get("norm_pix_loss", False)))
    elif "head" in layouts.groups_in(tensors, "hf"):
        description.config.task = "finetune"
        description.update("classify", head="linear", pool="cls", norm_after_pool=False)


def describe_scaling(description: Description, path: epath.Path) -> None:
    """Sets mean and std of the pixels from preprocessor_config.json or timm's config.json; else they are left open."""
    file = path / "preprocessor_config.json"
    stored = (files.read_json(file) if path.is_dir() else None) or {}
    of_timm = (files.read_json(path / "config.json") if path.is_dir() else None) or {}
    scaling = of_timm.get("pretrained_cfg")
    if isinstance(scaling, dict) and "mean" in scaling and "std" in scaling:
        stored = {"image_mean": scaling["mean"], "image_std": scaling["std"]}
    if not stored.get("do_rescale", True) or abs(stored.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise DataFault(f"{file}: pixels are not scaled by 1/255 (do_rescale, rescale_factor), as here")
    if not stored.get("do_normalize", True):
        description.update("data", mean=(0.0,), std=(1.0,))
    elif "image_mean" in stored and "image_std" in stored:
        mean, std = (tuple(float(v) for v in stored[name]) for name in ("image_mean", "image_std"))
        description.update("data", mean=mean, std=std)
    else:
        rgb = description.config.model.channels == 3
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if rgb else ((0.0,), (1.0,))
        description.leave_open("how pixels are scaled, as published", {"data.mean": mean, "data.std": std})


def describe_timm(description: Description, tensors: layouts.Tensors) -> layouts.Tensors:
    """Sets the fields of the model that names and shapes show; returns the tensors with whole position embeddings."""

    def rows(name: str) -> int:
        tensor = tensors.get(name)
        return tensor.shape[0] if tensor is not None and tensor.ndim else 0

    def hidden(name: str, dim: int) -> float:
        return hugging_face.ratio(rows(name), dim) if rows(name) and dim else 1.0

    def depth(prefix: str) -> int:
        numbers = {name.split(".")[1] for name in tensors if name.startswith(prefix)}
        return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)

    embed_dim, channels, *patch = tensors["patch_embed.proj.weight"].shape
    has_cls = "cls_token" in tensors
    description.update(
        "model",
        patch_size=tuple(patch),
        channels=channels,
        embed_dim=embed_dim,
        depth=depth("blocks."),
        mlp_ratio=hidden("blocks.0.mlp.fc1.weight", embed_dim),
        cls_token="learned" if has_cls else "none",
        cls_tokens=1,
        mask_token="learned",
        # Only whether there is one matters to trained weights.
        layer_scale_init=1.0 if "blocks.0.ls1.gamma" in tensors else 0.0,
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
    )
    _describe_heads(description, "", embed_dim, _NUM_HEADS)
    description.leave_open("as published", {"model.norm_eps": 1e-6, "model.gelu": "exact"})
    groups = layouts.groups_in(tensors, "timm")
    if "head" in groups:
        _describe_classifier(description, "fc_norm.weight" in tensors, has_cls)
    elif "decoder" in groups and "decoder_embed.weight" in tensors:
        dim = rows("decoder_embed.weight")
        description.update(
            "model",
            decoder_embed_dim=dim,
            decoder_depth=depth("decoder_blocks."),
            decoder_mlp_ratio=hidden("decoder_blocks.0.mlp.fc1.weight", dim),
        )
        _describe_heads(description, "decoder_", dim, _DECODER_NUM_HEADS)
        masks = {"model.masking": "random", "model.mask_ratio": 0.75, "pretrain.norm_pix_loss": False}
        description.leave_open("as the paper's code by default", masks)
    return _describe_positions(description, tensors, has_cls)


def _describe_heads(description: Description, prefix: str, dim: int, published: dict[int, int]) -> None:
    field, width = f"model.{prefix}num_heads", f"model.{prefix}embed_dim"
    if description.template is None:
        if dim not in published:
            raise ConfigError(
                f"{description.origin} does not say {field} and a width of {dim} is none of the published ones; give "
                f"--config F with it: --config.{width}={dim} --config.{field}=…"
            )
    else:
        given, heads = (config_lib.get(description.template, name) for name in (width, field))
        if given != dim and dim in published and published[dim] != heads:
            raise ConfigError(
                f"{description.origin} is {dim} wide, where published models have {published[dim]} heads, and the "
                f"config says {field}={heads} of {width}={given}: which is right, the weights do not say. If the "
                f"config is for these weights, set --config.{width}={dim} and --config.{field}={published[dim]} or "
                f"={heads}; if it is for others, give theirs"
            )
    description.leave_open(f"as published for a width of {dim}", {field: published.get(dim)}, also={width: dim})


def _describe_classifier(description: Description, norm_after_pool: bool, has_cls: bool) -> None:
    template = description.template
    description.config.task = "finetune"
    description.update("classify", head="linear", norm_after_pool=norm_after_pool)
    if norm_after_pool or not has_cls:
        description.update("classify", pool="gap")
    else:
        classifies = template is not None and not kind_of(template).has_decoder
        description.leave_open(
            "as published where no norm follows the pooling",
            {"classify.pool": "cls"},
            ask_template=classifies,
            also={"task": "finetune"},
        )


def _describe_positions(description: Description, tensors: layouts.Tensors, has_cls: bool) -> layouts.Tensors:
    """Sets the image size by pos_embed; adds to the tensors the class token's row or all of pos_embed if missing."""
    if "pos_embed" not in tensors:
        return _compute_positions(description, tensors, has_cls)
    patch = tuple(description.config.model.patch_size)
    size = (0, 0) if description.template is None else tuple(description.template.model.image_size)
    given = (size[0] // patch[0]) * (size[1] // patch[1])
    table = tensors["pos_embed"]
    length = table.shape[1]
    counts = [length - 1, length] if has_cls else [length]  # timm's no_embed_class: the class token has no row
    count = given if given and given in counts else next((n for n in counts if n > 0 and math.isqrt(n) ** 2 == n), 0)
    if not count:
        raise ConfigError(
            f"{description.origin}: pos_embed has {length} rows, no square grid of patches; give --config F with the "
            f"images' (height, width), in patches of {patch}: --config.model.image_size=…"
        )
    if count == given:
        description.leave_open("", {"model.image_size": size})
        description.update("model", image_size=(size[0] // patch[0] * patch[0], size[1] // patch[1] * patch[1]))
    else:
        why = f"{count} positions are a square" + (f", and the config's {size} are {given} patches" if given else "")
        side = math.isqrt(count)
        assumed = {"model.image_size": (side * patch[0], side * patch[1])}
        description.leave_open(why, assumed, ask_template=False)
    if count == length and has_cls:
        return {**tensors, "pos_embed": np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)}
    return tensors


def _compute_positions(description: Description, tensors: layouts.Tensors, has_cls: bool) -> layouts.Tensors:
    """Adds the fixed positions that the template names, for weights of a program that computes them."""
    relative = [name for name in tensors if "relative_position" in name]
    if relative:
        raise DataFault(
            f"{description.origin} has no pos_embed but {len(relative)} tensors of relative positions ({relative[0]}, "
            "…), which no model here has; take weights of a model with pos_embed"
        )
    template, config = description.template, description.config
    if template is None or template.model.pos_embed not in positions.FIXED_POSITIONS:
        said = "no config" if template is None else f"a config with model.pos_embed={template.model.pos_embed!r}"
        raise ConfigError(
            f"{description.origin} has no pos_embed and {said} is given: if its program computes fixed positions, say "
            f"which, by --config F --config.model.pos_embed={' or '.join(positions.FIXED_POSITIONS)} "
            "--config.model.image_size=…; learned ones are lost"
        )
    kind = template.model.pos_embed
    description.leave_open("", {"model.pos_embed": kind, "model.image_size": template.model.image_size})
    grid = patches.grid_size(config.model.image_size, config.model.patch_size)
    return layouts.with_fixed_positions(tensors, kind, grid, int(has_cls))
