"""The kinds of tasks: properties that models, checks and reports need before a task is built."""

from dataclasses import dataclass

from ml_collections import ConfigDict

from mae_dist.registry import Registry


@dataclass(frozen=True)
class TaskKind:
    """Properties of a task.

    Attributes:
      has_decoder: it pretrains: masks patches and reconstructs them. Otherwise it classifies whole images.
      trains_encoder: gradients reach the encoder. Otherwise only a head learns, from features that may be cached.
    """

    has_decoder: bool
    trains_encoder: bool

    @property
    def finetunes(self) -> bool:
        """True if it trains encoder and head on labels."""
        return self.trains_encoder and not self.has_decoder


PRETRAIN = TaskKind(has_decoder=True, trains_encoder=True)
PROBE = TaskKind(has_decoder=False, trains_encoder=False)
FINETUNE = TaskKind(has_decoder=False, trains_encoder=True)

TASK_KINDS: Registry[TaskKind] = Registry("task")
for _name, _kind in (("pretrain", PRETRAIN), ("probe", PROBE), ("finetune", FINETUNE)):
    TASK_KINDS.add(_name, _kind, TaskKind)


def kind_of(config: ConfigDict) -> TaskKind:
    """Returns the kind of `config.task`; raises `ConfigError` if no such task is known."""
    return TASK_KINDS.get(config.task)
