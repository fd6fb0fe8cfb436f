"""Makes the Task that a config names."""

from ml_collections import ConfigDict

from mae_dist.model.hooks import Hooks
from mae_dist.tasks.base import Task
from mae_dist.tasks.classify import make_classify
from mae_dist.tasks.pretrain import make_pretrain


def make_task(config: ConfigDict, num_classes: int, hooks: Hooks) -> Task:
    """The Task that `config.task` names, for a data set of `num_classes`."""
    if config.task == "pretrain":
        return make_pretrain(config, hooks)
    return make_classify(config, num_classes, hooks)
