"""Tasks: pretraining, probing and fine-tuning, each as one `Task` value."""

from mae_dist.tasks.base import Task
from mae_dist.tasks.classify import make_classify
from mae_dist.tasks.make import make_task, register
from mae_dist.tasks.pretrain import make_pretrain

__all__ = ["Task", "make_classify", "make_pretrain", "make_task", "register"]
