"""Checks a config before any device work: its fields one by one, its model, and what a run puts together."""

import itertools
import math
import re
from collections.abc import Iterable, Iterator

from ml_collections import ConfigDict

from mae_dist import names
from mae_dist.config.fields import value_faults
from mae_dist.config.imports import import_modules
from mae_dist.config.model_checks import model_faults, scaling_faults
from mae_dist.data import randaugment
from mae_dist.errors import ConfigError, nearest, nearest_divisor
from mae_dist.model import layers
from mae_dist.task_kinds import TASK_KINDS, kind_of
from mae_dist.trackers import faults as tracker_faults

# What data.labels may be, for the sources that read it; others may be a user's.
LABELS = {
    "folder": ("none", "folders", "csv:FILE"),
    "tar": ("none", "cls"),
    "parquet": ("none", "column:NAME"),
}
# Metrics of `online`.
ONLINE = ("val_knn_top1", "val_ridge_top1")


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
    _raise((*value_faults(config, "model."), *model_faults(config.model, masked), *scaling_faults(config)))


def _raise(faults: Iterable[str]) -> None:
    lines = list(faults)
    if lines:
        raise ConfigError("config cannot work:\n  - " + "\n  - ".join(lines))


def _faults(config: ConfigDict) -> Iterator[str]:
    yield from value_faults(config)
    known = config.task in TASK_KINDS
    yield from model_faults(config.model, masked=known and kind_of(config).has_decoder)
    yield from scaling_faults(config)
    if known:
        yield from _run_faults(config)
    yield from tracker_faults(config.trackers)


def _run_faults(config: ConfigDict) -> Iterator[str]:
    if config.global_batch_size > 0 and config.accum_steps > 0 and config.global_batch_size % config.accum_steps:
        yield (
            f"accum_steps={config.accum_steps} does not divide global_batch_size={config.global_batch_size}; "
            f"nearest that does: {nearest_divisor(config.global_batch_size, config.accum_steps)}"
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
    model = config.model
    if pools and config.classify.pool == "cls" and not layers.count_cls_tokens(model.cls_token, model.cls_tokens):
        none = "model.cls_token='none'" if model.cls_token == "none" else f"model.cls_tokens={model.cls_tokens}"
        yield f"classify.pool='cls' needs a class token and {none}; use classify.pool='gap'"
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
            f"{nearest_divisor(batch, data.repeats)}; or "
            f"global_batch_size={max(data.repeats, round(batch / data.repeats) * data.repeats)}"
        )


def parse_steps(steps: str) -> range:
    """Parses `10:15` into steps 10 to 15, both included; "" into none."""
    if not steps:
        return range(0)
    first, colon, last = steps.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ConfigError(f"profile_steps={steps!r} must be '' or first:last, the updates from 1, such as '10:15'")
    return range(int(first), int(last) + 1)
