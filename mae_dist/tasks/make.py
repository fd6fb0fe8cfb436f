"""The registry of tasks, and the function that makes the one that a config names."""

from collections.abc import Callable

from ml_collections import ConfigDict

from mae_dist.model.hooks import Hooks
from mae_dist.registry import Registry
from mae_dist.task_kinds import TASK_KINDS
from mae_dist.tasks.base import Task
from mae_dist.tasks.classify import make_classify
from mae_dist.tasks.pretrain import make_pretrain

MakeTask = Callable[[ConfigDict, int, Hooks], Task]

_MAKERS: Registry[MakeTask] = Registry("task")
_MAKERS.add("pretrain", lambda config, num_classes, hooks: make_pretrain(config, hooks), make_pretrain)
_MAKERS.add("probe", make_classify, make_classify)
_MAKERS.add("finetune", make_classify, make_classify)


def register(name: str, *, like: str) -> Callable[[MakeTask], MakeTask]:
    """Decorates the function that makes a task; `config.task` then accepts `name`.

    The function takes (config, num_classes, hooks) and returns a `Task`. Another loss for the same model:

        @mae_dist.tasks.register("l1_pretrain", like="pretrain")
        def l1_pretrain(config, num_classes, hooks):
            return make_pretrain(config, hooks, error=lambda pred, target: jnp.abs(pred - target))

    or `dataclasses.replace(make_pretrain(config, hooks), loss=…)`, with `mae_dist.model.build.functional` to call
    the model. The task trains the model of `like`, and whatever reads its checkpoints treats them as those of `like`.

    Args:
      name: the task's.
      like: "pretrain", "probe" or "finetune", the task whose model it has.

    Raises:
      ConfigError: another function has the name, or there is no task `like`.
    """
    kind = TASK_KINDS.get(like)

    def add(make: MakeTask) -> MakeTask:
        TASK_KINDS.add(name, kind, make)
        _MAKERS.add(name, make, make)
        return make

    return add


def make_task(config: ConfigDict, num_classes: int, hooks: Hooks) -> Task:
    """Makes the task that `config.task` names, for a data set of `num_classes`."""
    return _MAKERS.get(config.task)(config, num_classes, hooks)
