"""Epochs of a config as numbers of steps."""

import dataclasses

from ml_collections import ConfigDict

from mae_dist.task_kinds import kind_of


def rows_together(config: ConfigDict) -> int:
    """Returns how many consecutive rows must stay on one device: 2 for mixup and cutmix, which need pairs."""
    return 2 if kind_of(config).finetunes and (config.classify.mixup or config.classify.cutmix) else 1


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Epochs of a config as numbers of updates; an interval may be fractional, 0 is never."""

    total_steps: int
    warmup_steps: int
    eval_every_steps: float
    online_every_steps: float
    pictures_every_steps: float


def schedule(config: ConfigDict, num_examples: int) -> Schedule:
    """Counts a config's epochs in updates, for a training split of `num_examples`."""
    steps_per_epoch = num_examples / config.global_batch_size
    total = config.total_steps or max(1, round(config.total_epochs * steps_per_epoch))

    def every(section: ConfigDict) -> float:
        return section.every_steps or section.every_epochs * steps_per_epoch

    return Schedule(
        total_steps=total,
        warmup_steps=round(total * config.optim.warmup_epochs / config.total_epochs),
        eval_every_steps=every(config.eval),
        online_every_steps=every(config.online) if kind_of(config).has_decoder else 0,
        pictures_every_steps=every(config.pictures),
    )


def is_time(step: int, every_steps: float, total_steps: int) -> bool:
    """True if something due every `every` steps (0: never) is due after step `step`; always after the last.

    A fractional interval, as of epochs that are no whole number of updates, is due at the first update beyond it.
    """
    return every_steps > 0 and (step == total_steps or step // every_steps > (step - 1) // every_steps)
