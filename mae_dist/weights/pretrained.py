"""Opens trained weights: of a run, converted ones, a Hugging Face directory, or a timm state dict.

Shapes: B batch, H W C image, (gh, gw) grid, N tokens, D width.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from flax import traverse_util
from ml_collections import ConfigDict

from mae_dist import config as config_lib
from mae_dist import names
from mae_dist.checkpoint import reader
from mae_dist.errors import ConfigError, DataFault, StorageFault
from mae_dist.model import heads
from mae_dist.model.build import abstract_params
from mae_dist.model.layers import count_cls_tokens
from mae_dist.storage import absolute
from mae_dist.task_kinds import kind_of
from mae_dist.weights import aliases, files, foreign, hub, hugging_face, layouts

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A trained model, its parameters not read yet or still on the host.

    config: a whole config; `task` is `pretrain` for an encoder with or without its decoder, else `probe` or `finetune`.
    origin: what it is and where, for people.
    abstract: the shapes of the parameters there are, by group: `encoder` and maybe `decoder`, `head`.
    names_data: True if the config says which images it was trained on; foreign weights do not, without a template.
    load: a tree of shardings, of some of the parameters -> those; a `StorageFault` names what is missing.
    class_names: of the head's outputs, () where they are not stored with the weights.
    step: of the checkpoint of a run, else 0.
    run: the workdir of the run whose checkpoint this is; None for converted and foreign weights.
    """

    config: ConfigDict
    origin: str
    abstract: Params
    names_data: bool
    load: Callable[[Params], Params]
    class_names: tuple[str, ...] = ()
    step: int = 0
    run: epath.Path | None = None

    @property
    def num_classes(self) -> int:
        """Returns the number of outputs of the head, 0 without one."""
        return self.abstract["head"]["linear"]["bias"].shape[0] if "head" in self.abstract else 0

    def load_here(self, shapes: Params) -> Params:
        """Loads the parameters of `shapes`, a part of `abstract`, on this process's first device."""
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return self.load(jax.tree.map(lambda _: device, shapes))

    def load_whole(self) -> Params:
        """Loads every parameter as a NumPy array."""
        return jax.tree.map(np.asarray, self.load_here(self.abstract))


def open_source(source: str | os.PathLike[str], template: ConfigDict | None = None, *, commit: str = "") -> Pretrained:
    """Describes the trained weights that a user names: by a path as for `open_pretrained`, or a place on the hub.

    Those of the hub are downloaded first, of its `commit` if one is given.

    Raises:
      UserError: as `storage.absolute`, `hub.download` and `open_pretrained`.
    """
    given = os.fsdecode(source)
    if not given.startswith(names.HUB):
        return open_pretrained(absolute(given), template)
    downloaded = hub.download(given, commit)
    return dataclasses.replace(open_pretrained(downloaded.path, template), origin=downloaded.origin)


def open_pretrained(path: epath.Path, template: ConfigDict | None = None) -> Pretrained:
    """Describes the trained weights at `path`, in whichever layout they are.

    Args:
      path: the workdir of a run, a directory that `convert` wrote, one in Hugging Face's layout (ViTMAE, Pixio, ViT),
        a `.pth` or `.safetensors` file in timm's, or a directory with its config.json.
      template: a config for what the weights do not say, as heads and scaling of pixels in timm's layout, and for
        data. What neither says is assumed, with a line in the log. It may be of another task.

    Raises:
      DataFault: files that are corrupted, hostile, or do not hold the model they describe.
      ConfigError: something that has to be said by `template`, or contradicts it.
      StorageFault: a path that is none of these.
    """
    if path.is_dir():
        stored = files.read_json(path / "config.json")
        if stored is not None and "model_type" in stored:
            return _from_hugging_face(path, stored, template)
        if stored is not None and "architecture" in stored:  # of timm's own repositories
            return _from_timm(path, template)
        return open_workdir(path)
    if not path.exists():
        raise ConfigError(
            f"{path} does not exist; train that run first, or give a run's workdir, a directory of weights, a file, or "
            "hf://OWNER/NAME for weights of the Hugging Face hub"
        )
    return _from_timm(path, template)


def open_workdir(path: epath.Path, step: int | None = None) -> Pretrained:
    """Describes the weights of a run, or what `convert` wrote: of the newest good checkpoint, or of that of `step`."""
    config = reader.read_config(path)
    found, shapes = reader.param_shapes(path, step)
    num_classes = shapes["head"]["linear"]["bias"].shape[0] if "head" in shapes else 0
    abstract = abstract_params(config, num_classes)
    abstract = {group: tree for group, tree in abstract.items() if group in shapes}

    def load(shardings: Params) -> Params:
        return reader.load_params(path, _select(abstract, shardings, path), shardings, step)[1]

    meta = reader.read_meta(path / "checkpoints" / str(found))
    names = tuple(meta.get("class_names", ()))
    run = None if reader.WEIGHTS_ONLY in meta else path
    return Pretrained(config, f"{path}, step {found}", abstract, True, load, step=found, class_names=names, run=run)


def _select(tree: Any, wanted: Any, origin: Any, name: str = "") -> Any:
    """Returns the part of a tree of parameters that `wanted` has too; a `StorageFault` names what is missing."""
    if not isinstance(wanted, dict):
        return tree
    missing = [f"{name}{key}" for key in wanted if key not in tree]
    if missing:
        raise StorageFault(
            f"{origin} has no {', '.join(missing)}, which this model needs; a fine-tuned encoder lacks the last norm "
            "where classify.norm_after_pool is true, converted weights may lack the decoder: begin from its "
            "pretraining, or from weights converted without --encoder_only"
        )
    return {key: _select(tree[key], value, origin, f"{name}{key}/") for key, value in wanted.items()}


def _from_hugging_face(path: epath.Path, stored: dict[str, Any], template: ConfigDict | None) -> Pretrained:
    if stored["model_type"] not in hugging_face.MODEL_TYPES:
        raise DataFault(
            f"{path / 'config.json'}: model_type {stored['model_type']!r} is no masked autoencoder; it can be "
            "'vit_mae', 'pixio', or 'vit' for a classifier"
        )
    described = foreign.Description(f"Hugging Face layout in {path}", template)
    tensors = aliases.with_standard_names(_unwrapped(path))
    try:
        foreign.describe_hugging_face(described, stored, tensors)
        names = {int(number): str(name) for number, name in (stored.get("id2label") or {}).items()}
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise DataFault(f"{path / 'config.json'} does not describe a model: {error!r}") from error
    foreign.describe_scaling(described, path)
    found = _from_tensors(described, tensors, "hf")
    return dataclasses.replace(found, class_names=tuple(names[number] for number in sorted(names)))


def _from_timm(path: epath.Path, template: ConfigDict | None) -> Pretrained:
    described = foreign.Description(f"timm layout in {path}", template)
    tensors = _unwrapped(path)
    if any(name.startswith(("vit.", "embeddings.")) for name in tensors):
        raise DataFault(
            f"{path} has Hugging Face's names; give the directory that also holds its config.json instead of the file"
        )
    tensors = aliases.with_timm_names(tensors)
    kernel, table = tensors.get("patch_embed.proj.weight"), tensors.get("pos_embed")
    if kernel is None or kernel.ndim != 4 or not kernel.size or (table is not None and table.ndim != 3):
        shown = ", ".join(list(tensors)[:5]) or "no tensor"
        raise DataFault(
            f"{path} is no vision transformer in timm's layout, which has patch_embed.proj.weight (D, C, ph, pw) and "
            f"pos_embed (1, N, D); it has {len(tensors)} tensors: {shown}, …"
        )
    if (folded := aliases.fold_head_norm(tensors, heads.EPS)) is not None:
        tensors = folded
        described.assume(
            f"eps={heads.EPS} (as the paper's code) in the BatchNorm before the head",
            "only the head's logits depend on it",
        )
    tensors = foreign.describe_timm(described, tensors)
    foreign.describe_scaling(described, path)
    return _from_tensors(described, tensors, "timm")


def _unwrapped(path: epath.Path) -> layouts.Tensors:
    """Reads the tensors of the one model in a file or directory, by the model's own names."""
    tensors = files.read_tensors(path)
    prefixes = aliases.prefixes_in(tensors)
    if len(prefixes) > 1:
        raise DataFault(
            f"{path} holds {len(prefixes)} models, whose names begin with {files.some(prefixes)}; "
            + files.how_to_extract(path, prefix=prefixes[-1])
        )
    prefix = "".join(prefixes)
    outside = [name for name in tensors if not name.startswith(prefix)]
    if prefix:
        left_out = f", and leaving out what does not: {files.some(outside)}" if outside else ""
        logging.warning("%s: taking the model whose names begin with %s%s", path, files.some(prefixes), left_out)
    return {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}


def _from_tensors(described: foreign.Description, tensors: layouts.Tensors, layout: str) -> Pretrained:
    """Checks the tensors against the config that describes them, and makes them our parameters."""
    config, origin, groups = described.config, described.origin, layouts.groups_in(tensors, layout)
    model = config.model
    tensors = _settle_constants(described, tensors, layout)
    # Before anything of that depth is built: a description may claim any.
    if max(model.depth, model.decoder_depth) > len(tensors):
        raise DataFault(f"{origin}: {model.depth} blocks are described and there are only {len(tensors)} tensors")
    try:
        config_lib.validate_model(config, masked=layout == "hf" and "decoder" in groups)
    except ConfigError as error:
        raise DataFault(f"{origin}: the described model cannot be: {error}") from error
    head = tensors.get("classifier.weight" if layout == "hf" else "head.weight")
    abstract = abstract_params(config, head.shape[0] if head is not None and head.ndim else 1)
    if kind_of(config).has_decoder:
        abstract = {group: abstract[group] for group in groups if group in abstract}
    try:
        params = layouts.from_layout(tensors, abstract, model, layout)
    except DataFault as error:
        raise DataFault(f"{origin}: {error}") from error

    def load(shardings: Params) -> Params:
        return jax.tree.map(jax.device_put, _select(params, shardings, origin), shardings)

    return Pretrained(config.lock(), origin, abstract, described.template is not None, load)


def _settle_constants(described: foreign.Description, tensors: layouts.Tensors, layout: str) -> layouts.Tensors:
    """Decides whether positions and tokens that could be constants are; the same function either way.

    A fixed table may be a learned one as it began, and a token of zeros may be learned too: a template says so.
    """
    model, template = described.config.model, described.template
    grid = tuple(size // max(1, patch) for size, patch in zip(model.image_size, model.patch_size, strict=True))
    kind, rounding = layouts.position_kind(
        tensors, layout, (grid[0], grid[1]), count_cls_tokens(model.cls_token, model.cls_tokens)
    )
    if template is not None and template.model.pos_embed == "learned":
        kind = "learned"
    elif rounding != "float32":
        logging.warning(
            "%s: its positions are the fixed ones of model.pos_embed=%r rounded to %s: taking the exact ones; "
            "--config F --config.model.pos_embed=learned keeps them as they are",
            described.origin,
            kind,
            rounding,
        )
    described.update("model", pos_embed=kind)
    if template is not None:
        zero = [token for token in ("cls_token", "mask_token") if template.model[token] == "zero"]
        tensors, constant = layouts.without_zero_tokens(tensors, zero, layout)
        described.update("model", **dict.fromkeys(constant, "zero"))
    return tensors


def inflated(source: Pretrained, channels: int) -> Pretrained:
    """Returns an encoder whose patch embedding takes other channels, each by the mean of the old weights.

    An image whose channels are all equal gives the tokens of before. The decoder, which predicts the old ones, is left
    out; so is how pixels are scaled, which is the new channels' own.
    """
    old = source.config.model.channels
    abstract = {"encoder": {**source.abstract["encoder"]}}
    embed = abstract["encoder"]["patch_embed"]
    rows, width = embed["kernel"].shape
    shape = jax.ShapeDtypeStruct((rows // old * channels, width), embed["kernel"].dtype)
    abstract["encoder"]["patch_embed"] = {**embed, "kernel": shape}

    def inflate(kernel: jax.Array) -> jax.Array:  # (ph * pw * old, D) -> (ph * pw * channels, D)
        mean = kernel.reshape(-1, old, width).mean(axis=1, keepdims=True) * (old / channels)
        return jnp.broadcast_to(mean, (rows // old, channels, width)).reshape(-1, width)

    def load(shardings: Params) -> Params:
        loaded = source.load(shardings)
        embed = loaded["encoder"]["patch_embed"]
        sharding = shardings["encoder"]["patch_embed"]["kernel"]
        embed["kernel"] = jax.jit(inflate, out_shardings=sharding)(embed["kernel"])
        return loaded

    config = source.config.copy_and_resolve_references().unlock()
    config.model.channels = channels
    return dataclasses.replace(source, config=config.lock(), abstract=abstract, load=load)


def with_unit_layer_scale(source: Pretrained) -> Pretrained:
    """Returns the same function with a LayerScale of ones in every block, for a config that trains one."""
    abstract: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(source.abstract)
    for path in [path for path in abstract if path[-2:] == ("norm1", "scale")]:  # (layers, D), as LayerScale's
        abstract |= dict.fromkeys([(*path[:-2], "scale1"), (*path[:-2], "scale2")], abstract[path])

    def load(shardings: Params) -> Params:
        wanted = traverse_util.flatten_dict(shardings)
        scales = {path: wanted.pop(path) for path in list(wanted) if path[-1] in ("scale1", "scale2")}
        loaded = traverse_util.flatten_dict(source.load(traverse_util.unflatten_dict(wanted)))
        for path, sharding in scales.items():
            loaded[path] = jax.device_put(np.ones(abstract[path].shape, np.float32), sharding)
        return traverse_util.unflatten_dict(loaded)

    config = source.config.copy_and_resolve_references().unlock()
    config.model.layer_scale_init = 1.0
    return dataclasses.replace(source, config=config.lock(), abstract=traverse_util.unflatten_dict(abstract), load=load)
