"""What is trained: pretraining, probing and fine-tuning, each as one `Task` value for the one loop.

Shapes: B batch, H W C image, L patches, P values of one patch, D encoder width, Y classes. A batch holds `image` uint8
(B, H, W, C) or, for a probe on cached features, `features` float32 (B, D); `label` int32 (B,); in evaluation also
`index` int32 (B,), the example's place in its split, and `weight` float32 (B,), 0 for padding.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics
from flax import nnx, struct
from ml_collections import ConfigDict

from mae_dist import config as config_lib
from mae_dist import integrity, losses, mixing, patches
from mae_dist.layers import Constrain, unconstrained
from mae_dist.models import Classifier, MaskedAutoencoder

Batch = Mapping[str, jax.Array]
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """Model, loss and metrics of one kind of training.

    abstract_params: the shapes of the parameters, by group.
    init_params: key -> parameters.
    loss: (params, batch, keys (B,)) -> (loss of each example (B,), further per-example metrics (B,)); integers among
      them are summed, modulo their size, where others are averaged.
    evaluate: (params, batch) -> clu metrics, to be merged over batches.
    frozen: top-level parameter groups that are not trained.
    features: (params, batch) -> pooled features (B, D) of whole images by the encoder, where it is asked for them.
    reconstruct: (params, batch) -> pictures, see `make_pictures`.
    rows_together: so many rows of a batch, one after another, are needed at once by `loss`.
    statistics: (params, batch) -> new values of frozen groups. Where there is one, it and `loss` are given all of an
      update's examples at once, on whatever devices, and as `features`.
    """

    name: str
    abstract_params: Params
    init_params: Callable[[jax.Array], Params]
    loss: Callable[[Params, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
    evaluate: Callable[[Params, Batch], dict[str, clu_metrics.Metric]]
    frozen: tuple[str, ...] = ()
    features: Callable[[Params, Batch], jax.Array] | None = None
    reconstruct: Callable[[Params, Batch], dict[str, jax.Array]] | None = None
    rows_together: int = 1
    statistics: Callable[[Params, Batch], Params] | None = None


@struct.dataclass
class PerClassAccuracy(clu_metrics.Metric):
    """Accuracy of each class: correct and count, float32 (Y,). A class without examples is NaN."""

    correct: jax.Array
    count: jax.Array

    def merge(self, other: "PerClassAccuracy") -> "PerClassAccuracy":
        return PerClassAccuracy(correct=self.correct + other.correct, count=self.count + other.count)

    def compute(self) -> jax.Array:
        return jnp.where(self.count > 0, self.correct / jnp.maximum(self.count, 1), jnp.nan)


def scale_pixels(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """uint8 (B, H, W, C) -> float32 (pixel / 255 - mean) / std; mean and std have one value or one per channel."""
    return (images.astype(jnp.float32) / 255 - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def unscale_pixels(x: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """The inverse of `scale_pixels`, to values in 0..1 (clipped)."""
    return jnp.clip(x * jnp.asarray(std, jnp.float32) + jnp.asarray(mean, jnp.float32), 0, 1)


class Functional(NamedTuple):
    """A module taken apart.

    abstract: the shapes of its parameters, a nested dict.
    init: key -> its parameters.
    bind: parameters -> the module to call.
    """

    abstract: Params
    init: Callable[[jax.Array], Params]
    bind: Callable[[Params], Any]


def functional(make: Callable[[nnx.Rngs], nnx.Module]) -> Functional:
    """Takes apart the module that `make` makes, without making it."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)

    def init(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.split(make(nnx.Rngs(key)), nnx.Param)[1])

    return Functional(nnx.to_pure_dict(abstract), init, functools.partial(nnx.merge, graphdef))


def make_model(config: ConfigDict, num_classes: int, constrain: Constrain, rngs: nnx.Rngs) -> Any:
    """The module that `config` describes: a `MaskedAutoencoder`, or a `Classifier` for `num_classes`."""
    fields, options = config.model.to_dict(), config.classify
    if config.task == "pretrain":
        return MaskedAutoencoder(**fields, constrain=constrain, rngs=rngs)
    return Classifier(
        fields,
        num_classes=num_classes,
        kind=options.head,
        hidden_dim=options.hidden_dim,
        pool=options.pool,
        norm_after_pool=options.norm_after_pool,
        batch_norm=options.batch_norm,
        constrain=constrain,
        rngs=rngs,
    )


def abstract_params(config: ConfigDict, num_classes: int) -> Params:
    """The shapes of the parameters of `config`'s model, by group."""
    return functional(functools.partial(make_model, config, num_classes, unconstrained)).abstract


def make_task(config: ConfigDict, num_classes: int, constrain: Constrain) -> Task:
    """The Task that `config.task` names, for a data set of `num_classes`."""
    if config.task == "pretrain":
        return _pretrain(config, constrain)
    return _classify(config, num_classes, constrain)


def _pretrain(config: ConfigDict, constrain: Constrain) -> Task:
    mean, std, norm_pix_loss = config.data.mean, config.data.std, config.pretrain.norm_pix_loss
    abstract, init, bind = functional(functools.partial(make_model, config, 0, constrain))

    def forward(params: Params, batch: Batch, mask_keys: jax.Array) -> Any:
        model = bind(params)
        ids_shuffle, kept = model.draw_ids_shuffle(mask_keys)
        return model(scale_pixels(batch["image"], mean, std), ids_shuffle, kept, None)

    def target(true: jax.Array) -> jax.Array:
        return losses.normalize_patches(true) if norm_pix_loss else true

    def loss(params: Params, batch: Batch, keys: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = bind(params)
        ids_shuffle, kept = model.draw_ids_shuffle(keys)
        images = scale_pixels(batch["image"], mean, std)
        pred, true = model.removed_patches(images, ids_shuffle, kept, keys)  # (B, L - K, P)
        traced = {"trace": _trace(batch["image"], ids_shuffle)} if config.trace else {}
        return jnp.square(pred - target(true)).mean(axis=(1, 2)), traced

    def fixed_keys(batch: Batch) -> jax.Array:
        """One mask per example of a split, the same at every evaluation and on any devices: keys (B,)."""
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(config.seed), batch["index"])

    def evaluate(params: Params, batch: Batch) -> dict[str, clu_metrics.Metric]:
        pred, true, mask = forward(params, batch, fixed_keys(batch))
        values = losses.masked_pixel_loss(pred, target(true), mask)
        return {"loss": clu_metrics.Average.from_model_output(values, batch["weight"] > 0)}

    def features(params: Params, batch: Batch) -> jax.Array:
        model = bind(params)
        x = patches.patchify(scale_pixels(batch["image"], mean, std), config.model.patch_size)
        return model.encoder.pool(model.encoder(x, None, None), config.classify.pool)

    def reconstruct(params: Params, batch: Batch) -> dict[str, jax.Array]:
        return make_pictures(config, *forward(params, batch, fixed_keys(batch)))

    return Task(
        name="pretrain",
        abstract_params=abstract,
        init_params=init,
        loss=loss,
        evaluate=evaluate,
        features=features,
        reconstruct=reconstruct,
    )


def _trace(images: jax.Array, ids_shuffle: jax.Array) -> jax.Array:
    """What each example and its mask are, as one number: uint32 (B,)."""
    return jax.vmap(lambda image, ids: integrity.checksum(image) ^ integrity.checksum(ids + 1))(images, ids_shuffle)


def make_pictures(config: ConfigDict, pred: jax.Array, true: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Turns a prediction into pictures.

    Args:
      config: of the pretraining; `pictures.pix_stats` says whence the moments of normalised patches are.
      pred: predictions (B, L, P), normalised per patch where the loss was.
      true: the patches as the model saw them (B, L, P).
      mask: (B, L), 1 where a patch was removed.

    Returns:
      `original`, `masked`, `reconstruction`, `with_visible`: float32 (B, H, W, C) in 0..1.
    """
    mean, std, model = config.data.mean, config.data.std, config.model
    pixels = pred
    if config.pretrain.norm_pix_loss:  # the model says nothing of the patches' moments
        if config.pictures.pix_stats == "visible":
            moments = losses.visible_moments(true, mask, patches.grid_size(model.image_size, model.patch_size))
        else:
            moments = losses.patch_moments(true)
        pixels = losses.denormalize_patches(pred, *moments)
    removed = mask[:, :, None]  # (B, L, 1)

    def picture(x: jax.Array) -> jax.Array:
        return unscale_pixels(patches.unpatchify(x, model.image_size, model.patch_size), mean, std)

    gray = (0.5 - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)
    blank = patches.patchify(jnp.broadcast_to(gray, (1, *model.image_size, model.channels)), model.patch_size)
    return {
        "original": picture(true),
        "masked": picture(jnp.where(removed > 0, blank, true)),
        "reconstruction": picture(pixels),
        "with_visible": picture(jnp.where(removed > 0, pixels, true)),
    }


def _make_augment(config: ConfigDict, num_classes: int) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]] | None:
    """What fine-tuning does to a batch on the device: erasing, then mixing; None for nothing.

    (batch, keys (B,)) -> scaled pixels (B, H, W, C), their labels (B,) or soft ones (B, Y), and the label (B,) of the
    larger part.
    """
    options, mixes = config.classify, config_lib.rows_together(config) > 1
    if config.task != "finetune" or not (mixes or options.erase_prob > 0):
        return None

    def augment(batch: Batch, keys: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        images, label = scale_pixels(batch["image"], config.data.mean, config.data.std), batch["label"]
        # Purposes of the keys beyond those of the encoder and a decoder.
        erase_keys, mix_keys = (jax.vmap(jax.random.fold_in, (0, None))(keys, (1 << 17) + i) for i in range(2))
        if options.erase_prob > 0:
            images = mixing.erase(images, erase_keys, options.erase_prob)
        if not mixes:
            return images, label, label
        images, share = mixing.mix(
            images,
            mix_keys,
            mixup=options.mixup,
            cutmix=options.cutmix,
            prob=options.mix_prob,
            switch_prob=options.mix_switch_prob,
        )
        return images, *mixing.mix_labels(label, share, num_classes)

    return augment


def _classify(config: ConfigDict, num_classes: int, constrain: Constrain) -> Task:
    mean, std, options = config.data.mean, config.data.std, config.classify
    probe = config.task == "probe"

    abstract, init, bind = functional(functools.partial(make_model, config, num_classes, constrain))

    def features(params: Params, batch: Batch, keys: jax.Array | None = None) -> jax.Array:
        return bind(params).features(scale_pixels(batch["image"], mean, std), keys)

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
