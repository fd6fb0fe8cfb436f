"""The scalars by which runs of one compiled program differ: seed, learning rate, warm-up and length."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@struct.dataclass
class Hyperparams:
    """Arguments of the compiled step, not constants in it: a sweep over them compiles nothing new.

    No part of a checkpoint: the config has them. seed: uint32. peak_lr, final_lr: float32. warmup_steps, total_steps:
    int32. schedule: `cosine` or `constant`, which is part of the program.
    """

    seed: Any
    peak_lr: Any
    final_lr: Any
    warmup_steps: Any
    total_steps: Any
    schedule: str = struct.field(pytree_node=False)

    def learning_rate(self, step: jax.Array) -> jax.Array:
        """Returns the rate of the step after `step` others, float32: linear warm-up from 0, then the schedule.

        The formulas are those of `optax.linear_schedule` and `optax.cosine_decay_schedule`, operation by operation;
        theirs take the numbers of steps as Python numbers only.
        """
        done, warmup = jnp.float32(step), jnp.float32(self.warmup_steps)
        warming = self.peak_lr - self.peak_lr * (1 - done / jnp.maximum(warmup, 1))
        after = self.peak_lr
        if self.schedule == "cosine":
            decay_steps = jnp.maximum(jnp.float32(self.total_steps) - warmup, 1)
            angle = jnp.pi * jnp.minimum(done - warmup, decay_steps) / decay_steps
            after = self.final_lr + (self.peak_lr - self.final_lr) * (0.5 * (1 + jnp.cos(angle)))
        return jnp.where(done < warmup, warming, after)


def make_hyperparams(
    *,
    seed: int,
    schedule: str,
    base_lr: float,
    final_lr: float,
    warmup_steps: int,
    total_steps: int,
    global_batch_size: int,
) -> Hyperparams:
    """Returns the scalars as NumPy's, on no device.

    The peak follows the linear scaling rule: lr = base_lr * global_batch_size / 256 (Goyal et al. 2017).
    """
    return Hyperparams(
        seed=np.uint32(seed),
        peak_lr=np.float32(base_lr * global_batch_size / 256),
        final_lr=np.float32(final_lr),
        warmup_steps=np.int32(warmup_steps),
        total_steps=np.int32(total_steps),
        schedule=schedule,
    )
