"""Wires one run together: `build(config, devices, data) -> Job`. Nothing is allocated on a device here."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from mae_dist import config as config_lib
from mae_dist import platforms, readable
from mae_dist.cpu import cores
from mae_dist.cpu.microbatches import num_pieces
from mae_dist.data import Batches, Dataset, local_rows, to_global
from mae_dist.data.batches import UNCHANGED, Stream
from mae_dist.data.from_config import Data, complete, train_batches
from mae_dist.errors import ConfigError
from mae_dist.evaluation import evaluate
from mae_dist.evaluation.eval_step import make_eval_step
from mae_dist.model.build import Params, abstract_params, param_count
from mae_dist.model.flops import count_kept_patches, encoder_passes_of, train_flops_per_image
from mae_dist.model.parameters import parameter_rows
from mae_dist.optim import train_state as state
from mae_dist.optim.hyperparams import make_hyperparams
from mae_dist.optim.optimizer import make_optimizer
from mae_dist.optim.train_state import TrainState
from mae_dist.parallel import overview as parallel_overview
from mae_dist.parallel import shardings as sharding
from mae_dist.parallel.mesh import make_mesh
from mae_dist.task_kinds import kind_of
from mae_dist.tasks.base import Batch, Task
from mae_dist.tasks.make import make_task
from mae_dist.training.accumulation import fit_memory
from mae_dist.training.checks import check_data, check_exchange, check_mesh
from mae_dist.training.train_step import TrainStep, make_train_step
from mae_dist.weights import pretrained
from mae_dist.weights.compatible import check_fits


@dataclasses.dataclass(frozen=True)
class Job:
    """A wired run: all that training, evaluation, benchmark, plan and export need, compiled lazily."""

    config: ConfigDict
    data: Data
    mesh: Mesh
    task: Task
    schedule: config_lib.Schedule
    init: Callable[[jax.typing.ArrayLike], TrainState]  # of a seed, uint32
    abstract_state: TrainState
    shardings: TrainState
    eval_shardings: Params  # of the parameters in evaluations: `optim.shard_state` does not split them
    train_step: TrainStep
    eval_step: jax.stages.Wrapped
    feature_step: Any  # as eval_step, or None where the task has no such function
    reconstruct_step: Any
    batch_sharding: NamedSharding
    eval_batch_size: int
    encoder_passes: int  # of a step, in forward passes: 3 with gradients, 1 frozen, 0 where features are cached
    num_kept: int  # patches of an image that the encoder sees in a step
    flops_per_image: float
    stream: Stream = UNCHANGED

    @property
    def caches_features(self) -> bool:
        """True if cached features replace images, so that only the head runs."""
        return self.encoder_passes == 0

    @property
    def fingerprint(self) -> str:
        """Identifies the training examples and their order."""
        return self.data.train.fingerprint

    @property
    def meta(self) -> dict[str, Any]:
        """Returns what a checkpoint stores besides the state."""
        return {
            "config": config_lib.to_json(self.config),
            "data_fingerprint": self.fingerprint,
            "num_examples": self.data.train.num_examples,
            "stream": list(self.stream),
            "class_names": [] if kind_of(self.config).has_decoder else list(self.data.train.class_names),
        }

    def continuing(self, step: int, meta: dict[str, Any]) -> "Job":
        """Returns the job that continues a checkpoint of `step`, whose examples may have been others."""
        stream = Stream(*meta.get("stream", ()))
        if meta["data_fingerprint"] != self.fingerprint:
            num_unique = self.config.global_batch_size // self.config.data.repeats
            stream = stream.after(step, num_unique, meta.get("num_examples", self.data.train.num_examples))
            logging.info("The examples of now begin with epoch %d", stream.first_epoch + 1)
        return dataclasses.replace(self, stream=stream)

    @property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of one global training batch, with its sharding."""
        model = self.config.model
        rows = {
            "label": ((), jnp.int32),
            "image": ((*model.image_size, model.channels), jnp.dtype(self.data.train.dtype)),
        }
        if self.caches_features:
            rows = {"label": rows["label"], "features": ((model.embed_dim,), jnp.float32)}
        return {
            name: jax.ShapeDtypeStruct((self.config.global_batch_size, *shape), dtype, sharding=self.batch_sharding)
            for name, (shape, dtype) in rows.items()
        }

    def features_of(self, dataset: Dataset, params: Params) -> Iterator[evaluate.Columns]:
        """Yields the columns of each batch (see `evaluate.columns`): `features` (n, D) by the encoder of `params`."""

        def step(params: Params, batch: Batch) -> dict[str, jax.Array]:
            return {"features": self.feature_step(params, batch)}

        return evaluate.columns(step, params, dataset, self.batch_sharding, self.eval_batch_size)

    def gather(self, params: Params) -> Params:
        """Gathers a state's parameters over the data axis, for any number of evaluated batches; else copies nothing.

        One program gathers them all: one for each, as of `device_put`, can be too many at once (see `train_step`).
        """
        if self.eval_shardings == self.shardings.params:
            return params
        return jax.jit(_same, out_shardings=self.eval_shardings)(params)

    def overview(self) -> str:
        """Returns a table of the mesh and of every parameter's sharding."""
        return parallel_overview.overview(self.mesh, self.abstract_state, self.shardings)

    def init_state(self) -> TrainState:
        """Creates the state at step 0, sharded; with `config.init_from` it takes trained weights from there.

        Pretraining takes the encoder and, if there is one, the decoder; probe and finetune take the encoder.
        """
        options = None
        if self.mesh.devices.flat[0].platform == "cpu":
            numbers = sum(leaf.size for leaf in jax.tree.leaves(self.abstract_state.params))
            options = cores.options_to_run_once(jaxlib.version.__version__, numbers)
        new = jax.jit(self.init, out_shardings=self.shardings, compiler_options=options)(np.uint32(self.config.seed))
        if not self.config.init_from:
            return new
        source = _open_init_from(self.config)
        if self.config.model.layer_scale_init and not source.config.model.layer_scale_init:
            logging.info(
                "%s has no LayerScale: it begins as 1 in every block, the same function", readable.path(source.origin)
            )
            source = pretrained.with_unit_layer_scale(source)
        channels = self.config.model.channels
        if self.config.init_inflate and source.config.model.channels != channels:
            logging.info("The patch embedding of %s is spread over %d channels", readable.path(source.origin), channels)
            source = pretrained.inflated(source, channels)
            with source.config.unlocked():
                source.config.data.update(mean=self.config.data.mean, std=self.config.data.std)
        groups = [group for group in ("encoder", "decoder") if group in new.params and group in source.abstract]
        check_fits(source.config, self.config, groups)
        loaded = source.load({group: self.shardings.params[group] for group in groups})
        logging.info("%s from %s", " and ".join(groups), readable.path(source.origin))
        # The averages start as copies of the weights, because a step donates both.
        ema = new.ema and {**new.ema, **jax.tree.map(jnp.copy, {k: v for k, v in loaded.items() if k in new.ema})}
        return new.replace(params={**new.params, **loaded}, ema=ema)

    def batches(self, start: int = 0) -> Iterator[dict[str, jax.Array]]:
        """Yields the global batches of the steps `start`, `start` + 1, … to the last one of the schedule.

        The batch of a step is the same wherever one starts. Leaving the iterator, or closing it, ends its threads.

        Args:
          start: steps done already; the first batch is that of step `start` + 1 as metrics count.

        Yields:
          `image` (B, H, W, C), uint8 as a rule, and `label` int32 (B,), sharded by `batch_sharding`; B is
          `config.global_batch_size`.
        """
        rows = local_rows(self.batch_sharding, self.config.global_batch_size)
        with self.train_batches(self.data.train, start, rows) as batches:
            for batch in batches:
                yield to_global(batch, self.batch_sharding, self.config.global_batch_size, rows)

    def train_batches(self, dataset: Dataset, start_step: int, rows: np.ndarray) -> Batches:
        """Opens this process's rows of the batches of steps `start_step`, `start_step` + 1, …"""
        return train_batches(
            self.config,
            dataset,
            start_step=start_step,
            total_steps=self.schedule.total_steps,
            rows=rows,
            stream=self.stream,
        )


def _same(params: Params) -> Params:
    return params


def _open_init_from(config: ConfigDict) -> pretrained.Pretrained:
    return pretrained.open_source(config.init_from, config, commit=config.init_commit)


def _scaled_as_weights(config: ConfigDict) -> ConfigDict:
    """Returns a config whose pixels, if their scaling is left open, are scaled as for the weights of `init_from`."""
    if config.data.mean or not config.init_from:
        return config
    source = _open_init_from(config).config
    if source.model.channels == config.model.channels:
        config = config.copy_and_resolve_references().unlock()
        config.data.update(mean=source.data.mean, std=source.data.std)
    return config


def build(config: ConfigDict, devices: Sequence[Any], data: Data) -> Job:
    """Wires a validated config for `devices`, real or abstract.

    Raises:
      ConfigError: the config cannot run on this mesh; the message gives both numbers and the cure.
    """
    config = complete(_scaled_as_weights(config), data)
    check_mesh(config, len(devices))
    mesh = make_mesh(config.mesh.to_dict(), devices)
    check_exchange(config, mesh)
    schedule = config_lib.schedule(config, data.train.num_examples)
    if config.checkpoint.keep_best == "val_top5" and data.train.num_classes <= 5:
        raise ConfigError(
            f"checkpoint.keep_best='val_top5' and there are {data.train.num_classes} classes; use 'val_top1'"
        )
    kind = kind_of(config)
    check_data(config, data)
    encoder_passes = encoder_passes_of(config)
    num_kept = count_kept_patches(config)
    flops_per_image = train_flops_per_image(config, data.train.num_classes, num_kept, encoder_passes)
    num_params = param_count(abstract_params(config, data.train.num_classes))
    fit_memory(config, mesh, num_params, num_kept, encoder_passes)
    by_cores, matmul = sharding.is_by_cores(mesh), platforms.choose_matmul(config, mesh, flops_per_image)
    task = eval_task = make_task(config, data.train.num_classes, platforms.make_hooks(mesh, matmul))
    if matmul == "onednn":  # programs that call it cannot be cached on disk: not worth it for an evaluation
        eval_task = make_task(config, data.train.num_classes, platforms.make_hooks(mesh))
    if by_cores:
        config.cpu.products = matmul
    if not config.cpu.pieces:
        config.cpu.pieces = 1
        if encoder_passes:
            config.cpu.pieces = num_pieces(
                config,
                mesh,
                config.global_batch_size // config.accum_steps,
                num_kept,
                decoder=kind.has_decoder,
                update=kind.trains_encoder,
                rows_together=task.rows_together,
            )
    config.lock()
    eval_batch_size = config.eval.batch_size or config.global_batch_size
    eval_pieces = num_pieces(config, mesh, eval_batch_size, decoder=kind.has_decoder)
    trainable, _ = state.split_frozen(parameter_rows(task.abstract_params), task.frozen)
    options = config.optim.to_dict()
    del options["warmup_epochs"]
    of_mesh = {name: options.pop(name) for name in ("shard_state", "grad_exchange")}
    hyperparams = make_hyperparams(
        seed=config.seed,
        **{name: options.pop(name) for name in ("schedule", "base_lr", "final_lr")},
        warmup_steps=schedule.warmup_steps,
        total_steps=schedule.total_steps,
        global_batch_size=config.global_batch_size,
    )
    tx = make_optimizer(trainable, **options)
    begin = functools.partial(state.begin, tx=tx, frozen=task.frozen, has_ema=config.ema_decay > 0)

    def init(seed: jax.typing.ArrayLike) -> TrainState:
        return begin(task.init_params(jax.random.key(seed)))

    abstract_state = jax.eval_shape(begin, task.abstract_params)
    shardings = state.state_shardings(mesh, abstract_state, tx, task.frozen, config.optim.shard_state)
    train_step = make_train_step(
        task,
        tx,
        hyperparams,
        mesh=mesh,
        shardings=shardings,
        global_batch_size=config.global_batch_size,
        accum_steps=config.accum_steps * config.cpu.pieces,
        ema_decay=config.ema_decay,
        # Unfolding would stack the blocks again for every microbatch if they are scanned.
        fold=by_cores and config.cpu.fold and not config.model.scan and task.statistics is None,
        dtype=config.model.dtype,
        **of_mesh,
    )

    eval_shardings = sharding.param_shardings(mesh, task.abstract_params)

    def forward(fn: Any, per_example: bool, pieces: int) -> Any:
        return fn and make_eval_step(fn, mesh=mesh, params=eval_shardings, per_example=per_example, pieces=pieces)

    return Job(
        config=config,
        data=data,
        mesh=mesh,
        task=task,
        schedule=schedule,
        init=init,
        abstract_state=abstract_state,
        shardings=shardings,
        eval_shardings=eval_shardings,
        train_step=train_step,
        eval_step=forward(eval_task.evaluate, per_example=False, pieces=eval_pieces if encoder_passes else 1),
        feature_step=forward(eval_task.features, per_example=True, pieces=num_pieces(config, mesh, eval_batch_size)),
        reconstruct_step=forward(eval_task.reconstruct, per_example=True, pieces=1),
        batch_sharding=sharding.batch_sharding(mesh),
        eval_batch_size=eval_batch_size,
        encoder_passes=encoder_passes,
        num_kept=num_kept,
        flops_per_image=flops_per_image,
    )
