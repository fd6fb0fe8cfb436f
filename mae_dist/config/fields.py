"""Checks each field of a config by itself: that it exists, its type, choices and bounds.

Fields and their defaults are in `mae_dist/config/default.py`; there are none here.
"""

import math
from collections.abc import Collection, Iterator

from ml_collections import ConfigDict

from mae_dist import names
from mae_dist.config import default
from mae_dist.config.stored import flatten, get
from mae_dist.data import AUGMENTATIONS, SOURCES
from mae_dist.data.image_files import DTYPES
from mae_dist.errors import ConfigError, nearest
from mae_dist.model import layers, masking, positions
from mae_dist.optim.optimizer import OPTIMIZERS
from mae_dist.registry import Registry
from mae_dist.storage import absolute_name
from mae_dist.task_kinds import TASK_KINDS

# A registry's choices grow as modules register theirs.
CHOICES: dict[str, Collection[str]] = {
    "task": TASK_KINDS,
    "cpu.products": ("auto", "onednn", "xla"),
    "model.decoder": layers.DECODERS,
    "model.masking": masking.STRATEGIES,
    "model.cls_token": layers.CLS_TOKENS,
    "model.mask_token": layers.MASK_TOKENS,
    "model.pos_embed": positions.POSITIONS,
    "model.gelu": ("exact", "tanh"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": layers.REMAT_POLICIES,
    "classify.head": ("linear", "mlp"),
    "classify.pool": ("gap", "cls"),
    "optim.name": OPTIMIZERS,
    "optim.schedule": ("cosine", "constant"),
    "optim.grad_exchange": ("float32", "bfloat16"),
    "data.source": SOURCES,
    "data.augment": AUGMENTATIONS,
    "data.dtype": ("auto", *DTYPES),
    "data.cache": ("auto", "memory", "stream"),
    "pictures.pix_stats": ("true", "visible"),
    "pictures.stretch": ("auto", "none", "percentile"),
}
POSITIVE = (
    "global_batch_size",
    "log_every_steps",
    "max_skipped_steps",
    "model.embed_dim",
    "model.depth",
    "model.num_heads",
    "model.mlp_ratio",
    "model.decoder_embed_dim",
    "model.decoder_depth",
    "model.decoder_num_heads",
    "model.decoder_mlp_ratio",
    "model.norm_eps",
    "classify.hidden_dim",
    "optim.base_lr",
    "optim.eps",
    "optim.trust_coefficient",
    "optim.layer_decay",
    "data.randaug_layers",
    "data.repeats",
    "data.max_pixels",
    "data.num_examples",
    "data.num_classes",
    "online.num_train",
    "online.k",
    "online.temperature",
    "online.ridge",
    "pictures.num_images",
    "checkpoint.keep_latest",
)
NOT_NEGATIVE = (
    "total_steps",
    "accum_steps",
    "cpu.devices",
    "cpu.pieces",
    "model.cls_tokens",
    "model.layer_scale_init",
    "classify.mixup",
    "classify.cutmix",
    "optim.final_lr",
    "optim.warmup_epochs",
    "optim.weight_decay",
    "optim.clip_norm",
    "optim.clip_value",
    "data.randaug_magnitude",
    "data.randaug_std",
    "data.num_workers",
    "data.max_value",
    "eval.every_epochs",
    "eval.every_steps",
    "eval.batch_size",
    "online.every_epochs",
    "online.every_steps",
    "pictures.every_epochs",
    "pictures.every_steps",
    "checkpoint.every_steps",
    "checkpoint.every_minutes",
    "checkpoint.keep_every_steps",
    "checkpoint.retries",
    *(f"deadlines.{name}_secs" for name in ("start", "step", "data", "checkpoint", "evaluate", "peer")),
)
FRACTIONS = (  # in [0, 1)
    "ema_decay",
    "model.drop_path",
    "model.dropout",
    "classify.label_smoothing",
    "optim.b1",
    "optim.b2",
    "optim.momentum",
    "data.max_bad_share",
    "data.val_fraction",
)

# Each in [0, 1].
PROBABILITIES = ("classify.mix_prob", "classify.mix_switch_prob", "classify.erase_prob", "data.background")

# Paths; "" is none, or a default.
PATHS = ("init_from", "compiled_step", "model.mask_file", "data.data_dir", "data.cache_dir")


def field_faults(config: ConfigDict) -> dict[str, str]:
    """Returns what is wrong with each field that does not exist, is missing or has another type, by dotted path."""
    found, known = dict(flatten(config)), dict(flatten(default.get_config()))
    faults = {}
    for field in found.keys() - known.keys():
        section, _, name = field.rpartition(".")
        beside = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == section]
        faults[field] = f"{field} does not exist.{nearest(name, beside)}"
    faults |= {field: f"{field} is missing; its default is {known[field]!r}" for field in known.keys() - found.keys()}
    for field in found.keys() & known.keys():
        value, usual = found[field], known[field]
        if not isinstance(value, (type(usual), int) if isinstance(usual, float) else type(usual)):
            faults[field] = f"{field}={value!r} is of type {type(value).__name__}, not {type(usual).__name__}"
    return dict(sorted(faults.items()))


def value_faults(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Checks each field whose name starts with `prefix` by itself."""
    for field, choices in CHOICES.items():
        value = get(config, field)
        if field.startswith(prefix) and value not in choices:
            if isinstance(choices, Registry):
                yield choices.fault(value)
            else:
                yield f"{field}={value!r} is not one of {', '.join(choices)}.{nearest(str(value), choices)}"
    for fields, test, needed in (
        (POSITIVE, lambda v: v > 0, "must be above 0"),
        (NOT_NEGATIVE, lambda v: v >= 0, "must not be negative"),
        (FRACTIONS, lambda v: 0 <= v < 1, "must be at least 0 and below 1"),
        (PROBABILITIES, lambda v: 0 <= v <= 1, "must be at least 0 and at most 1"),
    ):
        for field in fields:
            value = get(config, field)
            if field.startswith(prefix) and not (math.isfinite(value) and test(value)):
                yield f"{field}={value} {needed}"
    for field in PATHS:
        if field.startswith(prefix) and (value := get(config, field)):
            if field == "init_from" and value.startswith(names.HUB):
                if fault := names.hub_fault(value):
                    yield f"{field}: {fault}"
                continue
            try:
                absolute_name(value)
            except ConfigError as error:
                yield f"{field}: {error}"
