"""Training of a classifier: a probe on a frozen encoder, or fine-tuning of all weights."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics
from flax import struct
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from mae_dist import config as config_lib
from mae_dist.model.build import Params, functional, make_model
from mae_dist.model.hooks import Hooks
from mae_dist.task_kinds import kind_of
from mae_dist.tasks import losses, mixing
from mae_dist.tasks.base import Batch, Task, scale_pixels


@struct.dataclass
class PerClassAccuracy(clu_metrics.Metric):
    """Accuracy of each class; NaN for a class without examples."""

    correct: Any  # float32 (Y,): arrays of JAX or NumPy, or their shapes
    count: Any

    def merge(self, other: "PerClassAccuracy") -> "PerClassAccuracy":  # pyright: ignore[reportIncompatibleMethodOverride]
        return PerClassAccuracy(correct=self.correct + other.correct, count=self.count + other.count)

    def compute(self) -> Float[Array, "Y"]:
        return jnp.where(self.count > 0, self.correct / jnp.maximum(self.count, 1), jnp.nan)


def _make_augment(config: ConfigDict, num_classes: int) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]] | None:
    """Makes the augmentation of fine-tuning on the device, erasing and then mixing; None if both are off.

    It maps (batch, keys (B,)) to scaled pixels (B, H, W, C), labels (B,) or soft labels (B, Y), and the label (B,) with
    the larger weight.
    """
    options, mixes = config.classify, config_lib.rows_together(config) > 1
    if not kind_of(config).finetunes or not (mixes or options.erase_prob > 0):
        return None

    def augment(batch: Batch, keys: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        images, label = scale_pixels(batch["image"], config.data), batch["label"]
        # Numbers of purposes beyond those of the encoder and the decoder.
        erase_keys, mix_keys = (jax.vmap(jax.random.fold_in, (0, None))(keys, (1 << 17) + i) for i in range(2))
        if options.erase_prob > 0:
            images = mixing.erase(images, erase_keys, options.erase_prob)
        if not mixes:
            return images, label, label
        images, weight = mixing.mix(
            images,
            mix_keys,
            mixup=options.mixup,
            cutmix=options.cutmix,
            prob=options.mix_prob,
            switch_prob=options.mix_switch_prob,
        )
        return images, *mixing.mix_labels(label, weight, num_classes)

    return augment


def make_classify(config: ConfigDict, num_classes: int, hooks: Hooks) -> Task:
    """Returns the task of a classifier, whose encoder a probe freezes and fine-tuning trains."""
    options = config.classify
    probe = not kind_of(config).trains_encoder

    abstract, init, bind = functional(functools.partial(make_model, config, num_classes, hooks))

    def features(params: Params, batch: Batch, keys: jax.Array | None = None) -> jax.Array:
        return bind(params).features(scale_pixels(batch["image"], config.data), keys)

    def logits(params: Params, batch: Batch, keys: jax.Array | None, whole_batch: bool = False) -> jax.Array:
        pooled = batch["features"] if "features" in batch else features(params, batch, keys)
        return bind(params).logits(pooled, whole_batch=whole_batch)

    def statistics(params: Params, batch: Batch) -> Params:
        return {"batch_norm": bind(params).batch_norm.updated(batch["features"])}

    augment = _make_augment(config, num_classes)

    def loss(params: Params, batch: Batch, keys: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        target = label = batch["label"]
        if augment is not None:
            images, target, label = augment(batch, keys)
            out = bind(params)(images, keys)
        else:
            # A frozen encoder is also deterministic: no DropPath, no dropout.
            out = logits(params, batch, None if probe else keys, whole_batch=options.batch_norm)
        top1 = losses.top_k_correct(out, label, 1).astype(jnp.float32)
        return losses.cross_entropy(out, target, options.label_smoothing), {"top1": top1}

    def evaluate(params: Params, batch: Batch) -> dict[str, clu_metrics.Metric]:
        out, label, real = logits(params, batch, None), batch["label"], batch["weight"] > 0
        top1 = losses.top_k_correct(out, label, 1).astype(jnp.float32)
        one_hot = jax.nn.one_hot(label, num_classes, dtype=jnp.float32) * batch["weight"][:, None]  # (B, Y)
        result: dict[str, clu_metrics.Metric] = {
            "loss": clu_metrics.Average.from_model_output(losses.cross_entropy(out, label), real),
            "top1": clu_metrics.Average.from_model_output(top1, real),
            "per_class": PerClassAccuracy(correct=(one_hot * top1[:, None]).sum(0), count=one_hot.sum(0)),
        }
        if num_classes > 5:
            top5 = losses.top_k_correct(out, label, 5).astype(jnp.float32)
            result["top5"] = clu_metrics.Average.from_model_output(top5, real)
        return result

    return Task(
        name=config.task,
        abstract_params=abstract,
        init_params=init,
        loss=loss,
        evaluate=evaluate,
        frozen=("encoder", "batch_norm") if probe else (),
        features=features if probe else None,
        rows_together=config_lib.rows_together(config),
        statistics=statistics if options.batch_norm else None,
    )
