"""The model card of weights in Hugging Face's layout: README.md, whose head the hub reads. Only what is known is said.

https://huggingface.co/docs/hub/model-cards
"""

import math
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jinja2
from ml_collections import ConfigDict

from mae_dist import config as config_lib
from mae_dist import names, revision
from mae_dist.checkpoint import reader
from mae_dist.task_kinds import kind_of
from mae_dist.weights.pretrained import Pretrained

CARD_FILE = "README.md"
# Data sets of TFDS that are on the hub too, by its name.
_DATASETS = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "imagenet2012": "ILSVRC/imagenet-1k",
    "mnist": "ylecun/mnist",
}
_SCORES = {
    "loss": "loss",
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "knn_top1": "top-1 accuracy of k nearest neighbours of features",
    "ridge_top1": "top-1 accuracy of ridge regression of features",
}
# Fields of how a run was carried out that its result depends on; the others of `config.FREE` are left out.
_OF_THE_RESULT = ("imports", "total_epochs", "total_steps", "optim.grad_exchange")
_FILES = ("init_from", "model.mask_file")  # a path here is of no use there: its last name is kept


def make(
    source: Pretrained,
    trained: ConfigDict,
    config: ConfigDict,
    groups: Mapping[str, Any],
    name: str,
    summary: Mapping[str, Any],
    architecture: str,
) -> str:
    """Returns the text of a model card.

    Args:
      source: what was converted.
      trained: its config as it was trained; `config`: as it is now, perhaps of other images.
      groups: the parameters written, by group.
      name: of the directory.
      summary: summary.json of the run, or the values in it that are known.
      architecture: the class of transformers that they are for.
    """
    model = config.model
    is_run = source.run is not None
    dtype = "uint8" if config.data.dtype == "auto" else config.data.dtype
    divisor = {"uint8": 255, "uint16": 65535, "float32": 1}[dtype]
    if dtype != "uint8" and config.data.max_value:
        divisor = config.data.max_value
    of_mae = architecture == "ViTMAEForPreTraining"
    content: dict[str, Any] = {
        "name": name,
        "repo": f"OWNER/{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-.') or 'NAME'}",
        "architecture": architecture,
        "groups": {
            group: sum(leaf.size for leaf in jax.tree.leaves(tree))
            for group, tree in sorted(groups.items(), key=lambda item: item[0] != "encoder")
        },
        "model": model,
        "data": config.data,
        "loaded": "ViTMAEModel" if of_mae else architecture,
        "shape": ", ".join(map(str, (*model.image_size, model.channels))),
        "dtype": dtype,
        "divisor": divisor,
        "norm_pix_loss": config.pretrain.norm_pix_loss,
        "num_classes": source.num_classes if "head" in groups else 0,
        "origin": "" if is_run else _shown_origin(source.origin),
        "base_model": _base_model(trained.init_from if is_run else source.origin),
        "version": revision.described(),
        "jax_version": jax.__version__,
        "run": None,
        "datasets": [],
    }
    if is_run:
        content |= _of_run(source, trained, config, summary)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mae_dist.weights", "."),
        autoescape=False,  # Markdown
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = _code
    return environment.get_template("model_card.md.jinja").render(content)


def _of_run(source: Pretrained, trained: ConfigDict, config: ConfigDict, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what is known of a training."""
    assert source.run is not None
    meta = reader.read_meta(source.run / "checkpoints" / str(source.step))
    on_hub = trained.data.source == "tfds" and trained.data.name in _DATASETS
    return {
        "run": trained,
        "has_decoder": kind_of(trained).has_decoder,
        "init_from": _without_places("init_from", trained.init_from, trained),
        "total_steps": summary.get("total_steps", 0),
        "step": source.step,
        "num_examples": meta.get("num_examples", 0),
        "datasets": [_DATASETS[trained.data.name]] if on_hub else [],
        "command": [shlex.quote(argument) for argument in training_command(trained)],
        "environment": summary.get("environment", {}),
        "scores": list(_scores(summary)),
        "scores_step": summary.get("step", source.step),
        "is_changed": (config.model.image_size, config.model.channels)
        != (trained.model.image_size, trained.model.channels),
    }


def training_command(config: ConfigDict, base: str = "default") -> Iterator[str]:
    """Yields the arguments of `mae_dist.main` that train the same from the config named `base`, without places."""
    yield f"--config={base}"
    known = dict(config_lib.flatten(config_lib.get_config(base)))
    left_out = ["init_commit", *(field for field in config_lib.FREE if field not in _OF_THE_RESULT)]
    for field, value in config_lib.flatten(config):
        if value == known[field] or any(field == name or field.startswith(f"{name}.") for name in left_out):
            continue
        yield f"--config.{field}={_without_places(field, value, config)}"


def _without_places(field: str, value: Any, config: ConfigDict) -> Any:
    """Returns the value of a field without the directories of files, which are nobody else's; tuples for lists."""
    if field == "init_from" and value.startswith(names.HUB):
        return names.with_revision(value, config.init_commit) if config.init_commit else value
    if field in _FILES:
        return config_lib.last_name(value)
    if field == "data.labels" and value.startswith("csv:"):
        return f"csv:{config_lib.last_name(value)}"
    return tuple(value) if isinstance(value, list) else value


def _scores(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yields (what, split, value) of each score of a whole split."""
    for name, what in _SCORES.items():
        for split in ("train", "val", "test"):
            value = summary.get(f"{split}_{name}")
            if isinstance(value, int | float) and math.isfinite(value):
                yield what, split, f"{value:.4g}"


def _shown_origin(origin: str) -> str:
    """Returns where weights come from without directories of the machine that converted them."""
    return origin if origin.startswith(names.HUB) else re.sub(r"\S*/([^/\s]+)", r"\1", origin)


def _base_model(place: str) -> str:
    return names.hub_parts(place)[0] if place.startswith(names.HUB) and not names.hub_fault(place) else ""


def _code(text: object) -> str:
    """Returns a text as a code span of Markdown, in one line."""
    return f"`{' '.join(str(text).replace('`', chr(39)).split())}`"
