"""Makes the Task that a config names."""

from ml_collections import ConfigDict

from mae_dist.model.layers import Constrain
from mae_dist.tasks.base import Task
from mae_dist.tasks.classify import make_classify
from mae_dist.tasks.pretrain import make_pretrain


def make_task(config: ConfigDict, num_classes: int, constrain: Constrain) -> Task:
    """The Task that `config.task` names, for a data set of `num_classes`."""
    if config.task == "pretrain":
        return make_pretrain(config, constrain)
    return make_classify(config, num_classes, constrain)
