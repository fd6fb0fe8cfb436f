"""Computes features of whole splits by a trained encoder over all devices, for the commands that need them."""

import functools
import math
from collections.abc import Callable, Generator, Sequence

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from mae_dist.data import Dataset
from mae_dist.errors import ConfigError
from mae_dist.evaluation import evaluate
from mae_dist.evaluation.encode import make_feature_step, needed_shapes
from mae_dist.evaluation.evaluate import Columns
from mae_dist.model.build import Params
from mae_dist.parallel import shardings as sharding
from mae_dist.parallel.mesh import make_mesh
from mae_dist.weights import pretrained

Compute = Callable[[Dataset], Generator[Columns, None, None]]


def with_data(source: pretrained.Pretrained, given: ConfigDict | None, data_dir: str | None) -> ConfigDict:
    """Returns the model's config with data, mesh and batch size of the one given; scaling stays the model's.

    Raises:
      ConfigError: nothing says which images to take, or how many at once.
    """
    if not source.names_data:
        raise ConfigError(
            f"{source.origin} does not say which images to take; give --config with their data, or --images"
        )
    config = with_devices(source, given)
    with config.unlocked():
        if given is not None:
            scaling = {name: config.data[name] for name in ("mean", "std", "dtype", "max_value")}
            config.data.update({**given.data.to_dict(), **scaling})
        config.data.data_dir = data_dir or config.data.data_dir
    return config


def with_devices(source: pretrained.Pretrained, given: ConfigDict | None, num_images: int = 0) -> ConfigDict:
    """Returns the model's config with mesh and batch size of the one given, or a whole model on each device.

    `num_images`, if known, are all there will be: a batch is no larger.
    """
    config = source.config
    with config.unlocked():
        if given is None:
            config.mesh.update(data=-1, fsdp=1, tensor=1)
        else:
            config.update(mesh=given.mesh, eval=given.eval, global_batch_size=given.global_batch_size)
        config.eval.batch_size = config.eval.batch_size or config.global_batch_size
        config.eval.batch_size = min(config.eval.batch_size, num_images or config.eval.batch_size)
    if config.eval.batch_size < 1:
        raise ConfigError(f"a batch of {config.eval.batch_size} images; raise eval.batch_size to at least 1")
    return config


def last_split(config: ConfigDict) -> str:
    """Returns the name of the split that says most of a model: test, or where there is none val, or train."""
    return next(name for name in ("test", "val", "train") if config.data[f"{name}_split"])


def split_expression(config: ConfigDict, flag: str, value: str) -> str:
    """Returns the split that `--<flag>=<value>` names: train, val or test of the config, or an expression as it is."""
    split = config.data[f"{value}_split"] if value in ("train", "val", "test") else value
    if not split:
        raise ConfigError(f"--{flag}={value}: data.{value}_split is ''; name a split expression")
    return split


def prepare(
    source: pretrained.Pretrained, config: ConfigDict, kinds: Sequence[str], block: int | None = None
) -> Compute:
    """Returns a function of a dataset to the columns `kinds` (see `encode.make_encode`) of batch after batch."""
    mesh = make_mesh(config.mesh.to_dict(), jax.devices())
    make_step = functools.partial(make_feature_step, config, mesh, kinds=kinds, block=block)
    return with_step(source, needed_shapes(source), mesh, config.eval.batch_size, make_step)


def with_step(
    source: pretrained.Pretrained,
    shapes: Params,
    mesh: Mesh,
    batch_size: int,
    make_step: Callable[[PyTree, int], jax.stages.Wrapped],
) -> Compute:
    """Returns a function of a dataset to the columns (see `evaluate.columns`) that a step computes over all devices.

    Args:
      source: what the parameters are loaded from, once, for the first dataset.
      shapes: of the parameters that the step needs.
      mesh: of the devices.
      batch_size: rounded up to a multiple of the batch shards.
      make_step: (shardings of the parameters, batch size) -> the step.
    """
    shardings = sharding.param_shardings(mesh, shapes)
    batch_sharding, shards = sharding.batch_sharding(mesh), sharding.num_batch_shards(mesh)
    batch_size = math.ceil(batch_size / shards) * shards
    step, params = make_step(shardings, batch_size), functools.cache(lambda: source.load(shardings))

    def compute(dataset: Dataset) -> Generator[Columns, None, None]:
        with jax.set_mesh(mesh):
            yield from evaluate.columns(step, params(), dataset, batch_sharding, batch_size)

    return compute
