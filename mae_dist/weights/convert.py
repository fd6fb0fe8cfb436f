"""Converts trained weights to other layouts."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from flax import traverse_util
from ml_collections import ConfigDict

from mae_dist import config as config_lib
from mae_dist import errors
from mae_dist.checkpoint import reader
from mae_dist.model.layers import count_cls_tokens
from mae_dist.storage import appearing, check_checkpoints, storage_errors
from mae_dist.weights import adapt, aliases, files, hugging_face, layouts, model_card, pretrained

LAYOUTS = ("hf", "pixio", "timm", "mae_dist")
OF_TRANSFORMERS = ("hf", "pixio")  # directories with a config.json and a model card
Params = dict[str, Any]


def convert_weights(
    source: pretrained.Pretrained,
    out: epath.Path,
    to: str,
    *,
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
    encoder_only: bool = False,
    summary: Mapping[str, Any] | None = None,
) -> tuple[list[str], int]:
    """Writes `source` to `out` in the layout `to`, whole or not at all.

    Args:
      source: what to convert; its config is changed.
      out: a local path that does not exist.
      to: one of `LAYOUTS`.
      image_size: (height, width) to interpolate positions for.
      channels: to adapt the matmuls with patches to.
      encoder_only: leave out the decoder or the head.
      summary: for the model card of `hf` and `pixio`: summary.json of the run, or what is known of it.

    Returns:
      The groups written and how many values they hold.

    Raises:
      ConfigError: the layout cannot express the model, or the model cannot be of that size.
      DataFault: values that are not finite.
    """
    if to == "timm" and out.suffix not in (".safetensors", ".pth"):
        raise errors.ConfigError(f"--out={out}: a state dict is a file; end it in .safetensors or .pth")
    if to == "mae_dist":
        check_checkpoints(out, saving=True)
    config, params = source.config, source.load_whole()
    trained = config.copy_and_resolve_references()
    with config.unlocked():
        if encoder_only:
            params = {"encoder": params["encoder"]}
        if image_size is not None:
            params = adapt.resize_positions(params, config, image_size)
        if channels is not None:
            params = adapt.adapt_channels(params, config, channels)
        if to in OF_TRANSFORMERS:
            params = adapt.fold_layer_scale(params, config)
        if to != "mae_dist":
            params = adapt.fold_batch_norm(params, config)
        config.name = out.stem
    config_lib.validate_model(config, masked="decoder" in params)
    flat: Params = traverse_util.flatten_dict(params, sep="/")
    if bad := [name for name, leaf in flat.items() if not np.isfinite(leaf).all()]:
        raise errors.DataFault(
            f"{source.origin}: values that are not finite in {', '.join(bad)}; use another checkpoint"
        )
    with appearing(out) as temporary, storage_errors(out):
        write(temporary, params, config, to, source.origin, source.class_names)
        if to in OF_TRANSFORMERS:
            architecture = hugging_face.architecture(params, to)
            card = model_card.make(source, trained, config, params, out.name, summary or {}, architecture)
            (temporary / model_card.CARD_FILE).write_text(card)
        reread: Params = traverse_util.flatten_dict(pretrained.open_pretrained(temporary, config).load_whole(), sep="/")
        for name, leaf in flat.items():
            assert np.array_equal(leaf, reread.get(name, np.zeros(0))), f"{name} was not written as it is"
    return sorted(params, reverse=True), sum(leaf.size for leaf in flat.values())


def write(
    path: epath.Path, params: Params, config: ConfigDict, to: str, origin: str, class_names: Sequence[str] = ()
) -> None:
    """Writes parameters in a layout; `ConfigError` names what the layout cannot express."""
    if to == "mae_dist":
        reader.save_params(path, config, params, origin)
        return
    if faults := _not_expressible(params, config, to):
        helps = len(params) > 1 and not _not_expressible({"encoder": params["encoder"]}, config, to)
        raise errors.ConfigError(
            f"the {to} layout cannot express this model:\n  - "
            + "\n  - ".join(faults)
            + ("\n--encoder_only leaves out the decoder or the head; " if helps else "\n")
            + "--to=mae_dist expresses everything."
        )
    tensors = layouts.to_layout(params, config.model, _table(to))
    if to == "timm":
        files.write_tensors(path, tensors)
        return
    if to == "pixio":
        tensors = aliases.with_pixio_names(tensors)
    path.mkdir(parents=True)
    files.write_tensors(path / "model.safetensors", tensors)
    for name, value in _hugging_face_files(params, config, to, class_names).items():
        (path / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _table(to: str) -> str:
    """Returns which column of the table of parameters a layout is written by."""
    return "timm" if to == "timm" else "hf"


def _not_expressible(params: Params, config: ConfigDict, to: str) -> list[str]:
    model, classify = config.model, config.classify
    if "decoder" in params and model.decoder != "full":
        return [f"its decoder is another (model.decoder={model.decoder!r}), which has no counterpart"]
    faults = [f"{name} has no counterpart" for name in layouts.not_expressible(params, _table(to))]
    num_cls = count_cls_tokens(model.cls_token, model.cls_tokens)
    if num_cls > 1 and to != "pixio":
        faults.append(f"there are {num_cls} class tokens (model.cls_tokens), which only the pixio layout has")
    if to == "timm":
        return faults
    if num_cls == 0:
        faults.append("there is no class token (model.cls_token)")
    if "norm" not in params["encoder"] and "head" not in params:
        faults.append("the encoder has no last norm, its head has one instead (classify.norm_after_pool)")
    square = all(height == width for height, width in (model.image_size, model.patch_size))
    if not square and (to == "pixio" or "decoder" in params):
        faults.append(f"images {model.image_size} and patches {model.patch_size} are not square")
    if to == "pixio":
        faults += [f"there is a {group}, and PixioModel is an encoder alone" for group in params if group != "encoder"]
        if model.mlp_ratio != int(model.mlp_ratio):
            faults.append(f"model.mlp_ratio={model.mlp_ratio} is no whole number")
        return faults
    if "decoder" in params and (model.masking != "random" or model.mask_block > 1):
        squares = f" of {model.mask_block}x{model.mask_block} patches" if model.mask_block > 1 else ""
        logging.warning("Hugging Face's ViTMAE masks patches at random; the run masked by %r%s", model.masking, squares)
    if "head" in params and classify.pool != "cls":
        faults.append(f"its classifier reads the class token, and this one pools by {classify.pool!r}")
    return faults


def _hugging_face_files(
    params: Params, config: ConfigDict, to: str, class_names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Returns the content of config.json and preprocessor_config.json."""
    model = config.model
    if to == "pixio":
        described = hugging_face.describe_pixio(model)
    else:
        described = hugging_face.describe(config, has_decoder="head" not in params)  # ViT has neither decoder nor mask
    described |= {
        "architectures": [hugging_face.architecture(params, to)],
        "model_type": to if to == "pixio" else "vit" if "head" in params else "vit_mae",
        "torch_dtype": "float32",
    }
    if "head" in params:
        count = params["head"]["linear"]["bias"].shape[0]
        names = class_names if len(class_names) == count else [f"LABEL_{i}" for i in range(count)]
        described["id2label"] = {str(i): name for i, name in enumerate(names)}
        described["label2id"] = {name: i for i, name in enumerate(names)}
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": model.image_size[0], "width": model.image_size[1]},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(adapt.per_channel(config.data.mean, model.channels)),
        "image_std": list(adapt.per_channel(config.data.std, model.channels)),
    }
    return {"config.json": described, "preprocessor_config.json": preprocessor}
