"""Checks a config before any device work.

Fields and their defaults are in `mae_dist/config/default.py`; there are none here.
"""

import itertools
import math
import re
from collections.abc import Collection, Iterable, Iterator

from ml_collections import ConfigDict

from mae_dist import names
from mae_dist.config import default
from mae_dist.config.imports import import_modules
from mae_dist.config.stored import flatten, get
from mae_dist.data import AUGMENTATIONS, SOURCES, randaugment
from mae_dist.data.decode import DTYPES
from mae_dist.errors import ConfigError, nearest
from mae_dist.model import layers, masking, patches, positions
from mae_dist.optim.optimizer import OPTIMIZERS
from mae_dist.registry import Registry
from mae_dist.storage import absolute_name
from mae_dist.task_kinds import TASK_KINDS, kind_of
from mae_dist.trackers import faults as tracker_faults

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
# What data.labels may be, for the sources that read it; others may be a user's.
LABELS = {
    "folder": ("none", "folders", "csv:FILE"),
    "tar": ("none", "cls"),
    "parquet": ("none", "column:NAME"),
}
# Metrics of `online`.
ONLINE = ("val_knn_top1", "val_ridge_top1")

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


def validate(config: ConfigDict) -> None:
    """Raises one `ConfigError` that lists everything in `config` that cannot work, each with the cure.

    Imports the modules of `config.imports` first, whose names are choices too.
    """
    import_modules(config.imports)
    _raise(_faults(config))


def validate_model(config: ConfigDict, *, masked: bool) -> None:
    """Raises one `ConfigError` that lists what cannot be in the model of `config`, whatever training the rest asks for.

    Trained weights may have any task and the config that uses them another. `masked`: there is a decoder, so that
    masks have to fit too.
    """
    import_modules(config.imports)
    _raise((*_field_faults(config, "model."), *_model_faults(config.model, masked), *_scaling_faults(config)))


def _raise(faults: Iterable[str]) -> None:
    lines = list(faults)
    if lines:
        raise ConfigError("config cannot work:\n  - " + "\n  - ".join(lines))


def _faults(config: ConfigDict) -> Iterator[str]:
    yield from _field_faults(config)
    known = config.task in TASK_KINDS
    yield from _model_faults(config.model, masked=known and kind_of(config).has_decoder)
    yield from _scaling_faults(config)
    if known:
        yield from _run_faults(config)
    yield from tracker_faults(config.trackers)


def _field_faults(config: ConfigDict, prefix: str = "") -> Iterator[str]:
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


def _model_faults(model: ConfigDict, masked: bool) -> Iterator[str]:
    for prefix in ("", "decoder_"):
        dim, heads = model[f"{prefix}embed_dim"], model[f"{prefix}num_heads"]
        multiple = math.lcm(positions.FIXED_POSITIONS.get(model.pos_embed, 1), max(1, heads))
        if dim % positions.FIXED_POSITIONS.get(model.pos_embed, 1):
            yield (
                f"model.{prefix}embed_dim={dim} is not a multiple of "
                f"{positions.FIXED_POSITIONS[model.pos_embed]}, which model.pos_embed={model.pos_embed!r} needs; "
                f"nearest that {heads} heads divide too: {max(multiple, round(dim / multiple) * multiple)}"
            )
        elif heads > 0 and dim > 0 and dim % heads:
            yield (
                f"model.{prefix}num_heads={heads} does not divide model.{prefix}embed_dim={dim}; "
                f"nearest that does: {_nearest_divisor(dim, heads)}"
            )
        ratio = model[f"{prefix}mlp_ratio"]
        if dim > 0 and 0 < dim * ratio < 1:
            yield (
                f"model.{prefix}mlp_ratio={ratio} of model.{prefix}embed_dim={dim} leaves no "
                f"MLP; choose at least {math.ceil(1e5 / dim) / 1e5:g}"
            )
    for field in ("image_size", "patch_size"):
        if len(model[field]) != 2 or any(not isinstance(v, int) or v < 1 for v in model[field]):
            yield f"model.{field}={model[field]} must be two positive whole numbers, (height, width)"
            return
    if model.channels < 1:
        yield f"model.channels={model.channels} must be at least 1; 1 is gray, 3 RGB, 4 RGBA, more are bands"
    try:
        grid = patches.grid_size(model.image_size, model.patch_size)
        if masked and model.masking in masking.STRATEGIES:
            yield from _mask_faults(model, grid)
    except ConfigError as error:
        yield str(error)
    if model.decoder == "full":
        if model.predict_ratio != 1:
            yield (
                f"model.predict_ratio={model.predict_ratio} is for model.decoder='cross': the full decoder's tokens "
                "attend to each other, so all of them are needed; set it to 1.0, or choose model.decoder='cross'"
            )
        if model.fuse_blocks:
            yield "model.fuse_blocks is for model.decoder='cross'; set it to False, or choose that decoder"


def _mask_faults(model: ConfigDict, grid: tuple[int, int]) -> Iterator[str]:
    """Checks how many patches are kept; raises the strategy's own `ConfigError`."""
    length = grid[0] * grid[1]
    kept = masking.count_kept(strategy=model.masking, grid=grid, mask_ratio=model.mask_ratio, mask_file=model.mask_file)
    if length == 1:
        yield (
            f"model.patch_size={model.patch_size} leaves one patch of model.image_size={model.image_size}, "
            "and one must be kept and one removed; choose smaller patches"
        )
    elif 0 < kept < length:
        yield from _predict_faults(model, length - kept)
    elif masking.STRATEGIES.get(model.masking).count is masking.count_by_ratio:
        lowest, highest = math.ceil(1e4 / length) / 1e4, math.floor(1e4 - 1e4 / length) / 1e4
        yield (
            f"model.mask_ratio={model.mask_ratio} keeps {kept} of {length} patches; at least one "
            f"must be kept and one removed: choose {lowest:g} to {highest:g}"
        )
    else:
        yield (
            f"model.masking={model.masking!r} keeps {kept} of {length} patches by its own count; at least one must be "
            "kept and one removed: correct that function, or choose another model.masking"
        )


def _predict_faults(model: ConfigDict, num_removed: int) -> Iterator[str]:
    predicted = masking.count_predicted(num_removed, model.predict_ratio)
    if not 0 < predicted <= num_removed or not 0 < model.predict_ratio <= 1:
        lowest = math.ceil(1e4 / num_removed) / 1e4
        yield (
            f"model.predict_ratio={model.predict_ratio} predicts {predicted} of {num_removed} removed patches; it "
            f"must be at least one and at most all: choose {lowest:g} to 1"
        )


def _scaling_faults(config: ConfigDict) -> Iterator[str]:
    for field in ("mean", "std"):
        value = config.data[field]
        if len(value) not in (0, 1, config.model.channels):
            yield (
                f"data.{field}={value} has {len(value)} values; needed: 1, or one for each of "
                f"model.channels={config.model.channels}, or () to measure them"
            )
    if bool(config.data.mean) != bool(config.data.std):
        yield f"data.mean={config.data.mean} and data.std={config.data.std}: both are () to be measured, or neither"
    if not all(math.isfinite(v) for v in config.data.mean):
        yield f"data.mean={config.data.mean} must be finite"
    if not all(0 < v < math.inf for v in config.data.std):
        yield f"data.std={config.data.std} must be above 0"


def _run_faults(config: ConfigDict) -> Iterator[str]:
    if config.global_batch_size > 0 and config.accum_steps > 0 and config.global_batch_size % config.accum_steps:
        yield (
            f"accum_steps={config.accum_steps} does not divide global_batch_size={config.global_batch_size}; "
            f"nearest that does: {_nearest_divisor(config.global_batch_size, config.accum_steps)}"
        )
    if not 0 < config.total_epochs < math.inf:
        yield f"total_epochs={config.total_epochs} must be above 0, also with total_steps: the warm-up is a part of it"
    elif config.optim.warmup_epochs > config.total_epochs:
        yield (
            f"optim.warmup_epochs={config.optim.warmup_epochs} is longer than "
            f"total_epochs={config.total_epochs}; lower it too: "
            f"the paper warms up for a twentieth, here {config.total_epochs / 20:g}"
        )
    kind = kind_of(config)
    if config.classify.batch_norm and kind.trains_encoder:
        yield (
            f"classify.batch_norm is for task='probe' and task={config.task!r}: its statistics are over the whole "
            "batch, whose features only a frozen encoder computes ahead; set it to False"
        )
    if not kind.finetunes:
        for name in ("mixup", "cutmix", "erase_prob"):
            if config.classify[name]:
                yield (
                    f"classify.{name}={config.classify[name]} is for task='finetune' and task={config.task!r}; set it "
                    "to 0: a head alone underfits, and a pretraining has no labels"
                )
    decay = config.optim.layer_decay
    if decay > 1 or (decay != 1 and not kind.finetunes):
        yield (
            f"optim.layer_decay={decay} with task={config.task!r}: it must be at most 1, and 1 but for "
            "task='finetune', where the layers far from a new head change least"
        )
    if config.checkpoint.every_steps == 0 and config.checkpoint.every_minutes == 0:
        yield "checkpoint.every_steps=0 and checkpoint.every_minutes=0: nothing would be saved before the end; set one"
    yield from _retention_faults(config.checkpoint)
    if config.init_commit and not config.init_from.startswith(names.HUB):
        yield f"init_commit={config.init_commit!r} is for init_from=hf://OWNER/NAME; set it to '' without one"
    elif config.init_commit and not re.fullmatch("[0-9a-f]{40}", config.init_commit):
        yield f"init_commit={config.init_commit!r} is no whole commit, 40 hexadecimal digits; or set it to ''"
    if not kind.trains_encoder and not config.init_from:
        yield f"task={config.task!r} needs init_from=<workdir of a pretraining>; for random weights use task='finetune'"
    pools = not kind.has_decoder or config.online.every_epochs or config.online.every_steps
    if pools and config.classify.pool == "cls" and config.model.cls_token == "none":
        yield "classify.pool='cls' needs a class token and model.cls_token='none'; use classify.pool='gap'"
    if not kind.trains_encoder and config.classify.norm_after_pool:
        yield (
            "classify.norm_after_pool is for task='finetune': a probe keeps the encoder as it is, with its own norm; "
            "set it to False"
        )
    low, high = config.data.crop_scale if len(config.data.crop_scale) == 2 else (0, 0)
    if not 0 < low <= high <= 1:
        yield f"data.crop_scale={config.data.crop_scale} must be (low, high) with 0 < low <= high <= 1"
    yield from _augment_faults(config)
    metric = config.checkpoint.keep_best
    metrics = ("val_loss", *ONLINE) if kind.has_decoder else ("val_loss", "val_top1", "val_top5")
    if metric and metric not in metrics:
        yield f"checkpoint.keep_best={metric!r} is not one of {', '.join(metrics)} (or '').{nearest(metric, metrics)}"
    section = "online" if metric in ONLINE else "eval"
    if metric and not (config.data.val_split and (config[section].every_epochs or config[section].every_steps)):
        yield f"checkpoint.keep_best={metric!r} needs evaluations: set data.val_split and {section}.every_epochs"
    if not 0 <= config.seed < 2**32:
        yield f"seed={config.seed} must be at least 0 and below 2**32 = {2**32}"
    try:
        parse_steps(config.profile_steps)
    except ConfigError as error:
        yield str(error)
    if not config.name:
        yield "name='' must not be empty: it names the run's directory"
    if kind.has_decoder and config.pretrain.norm_pix_loss:
        values = math.prod(config.model.patch_size) * config.model.channels
        if values == 1:
            yield (
                "pretrain.norm_pix_loss needs more than one value in a patch, and model.patch_size is 1x1 of one "
                "channel; choose larger patches, or pretrain.norm_pix_loss=False"
            )


def _retention_faults(options: ConfigDict) -> Iterator[str]:
    """Checks `keep_every_steps` against the steps that are saved; with `keep_best` evaluated steps are saved too."""
    kept, saved = options.keep_every_steps, options.every_steps
    if kept <= 0 or saved < 0 or options.keep_best:
        return
    if saved == 0:
        yield (
            f"checkpoint.keep_every_steps={kept} and checkpoint.every_steps=0: saves by the minute meet its multiples "
            f"by chance alone, so nothing would be kept; set checkpoint.every_steps={kept}"
        )
    elif kept % saved and saved % kept:
        nearest_multiple = max(saved, round(kept / saved) * saved)
        yield (
            f"checkpoint.keep_every_steps={kept} is no multiple of checkpoint.every_steps={saved}: only "
            f"multiples of {math.lcm(kept, saved)} would be kept; nearest that is: {nearest_multiple}"
        )


def _augment_faults(config: ConfigDict) -> Iterator[str]:
    data, batch = config.data, config.global_batch_size
    if data.randaug_magnitude > randaugment.MAX_MAGNITUDE:
        yield f"data.randaug_magnitude={data.randaug_magnitude} must be at most {randaugment.MAX_MAGNITUDE:g}"
    if data.randaug_magnitude and data.augment == "none":
        yield (
            f"data.randaug_magnitude={data.randaug_magnitude} and data.augment='none'; RandAugment follows 'flip' or "
            "'crop_flip': choose one, or data.randaug_magnitude=0"
        )
    if data.randaug_magnitude and config.model.channels not in (1, 3):
        yield (
            f"data.randaug_magnitude={data.randaug_magnitude} and model.channels={config.model.channels}: "
            "RandAugment's colours have no meaning there; use 1 or 3 channels, or data.randaug_magnitude=0"
        )
    known = LABELS.get(data.source, tuple(dict.fromkeys(itertools.chain(*LABELS.values()))))
    if not any(re.fullmatch(re.sub("FILE|NAME", ".+", kind), data.labels) for kind in known):
        yield f"data.labels={data.labels!r} with data.source={data.source!r} is not one of {', '.join(known)}"
    shown = config.pictures.channels
    if len(shown) not in (0, 1, 3) or any(not isinstance(i, int) or not 0 <= i < config.model.channels for i in shown):
        yield (
            f"pictures.channels={shown} must be three numbers from 0 to {config.model.channels - 1}, shown as red, "
            "green and blue, or one number, or ()"
        )
    if data.repeats > 0 and batch > 0 and batch % data.repeats:
        yield (
            f"data.repeats={data.repeats} does not divide global_batch_size={batch}; nearest that does: "
            f"{_nearest_divisor(batch, data.repeats)}; or "
            f"global_batch_size={max(data.repeats, round(batch / data.repeats) * data.repeats)}"
        )


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda divisor: abs(divisor - wanted))


def parse_steps(steps: str) -> range:
    """Parses `10:15` into steps 10 to 15, both included; "" into none."""
    if not steps:
        return range(0)
    first, colon, last = steps.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ConfigError(f"profile_steps={steps!r} must be '' or first:last, the updates from 1, such as '10:15'")
    return range(int(first), int(last) + 1)
