"""Features of whole splits by a trained encoder, over all devices: what commands share that compute them.

Shapes: n examples of a batch, D width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from mae_dist.data import Dataset
from mae_dist.errors import ConfigError
from mae_dist.evaluation import evaluate
from mae_dist.evaluation.encode import make_feature_step, needed_shapes
from mae_dist.parallel import shardings as sharding
from mae_dist.parallel.mesh import make_mesh
from mae_dist.weights import pretrained

Columns = dict[str, np.ndarray]


def with_data(source: pretrained.Pretrained, given: ConfigDict | None, data_dir: str | None) -> ConfigDict:
    """The model's config with data, mesh and batch size of the one that was given; scaling stays the model's.

    Raises:
      ConfigError: nothing says which images to take, or how many at once.
    """
    if not source.names_data:
        raise ConfigError(f"{source.origin} does not say which images to take; give --config with their data")
    config = source.config
    with config.unlocked():
        if given is None:
            config.mesh.update(data=-1, fsdp=1, tensor=1)
        else:
            scaling = {name: config.data[name] for name in ("mean", "std")}
            config.update(data={**given.data.to_dict(), **scaling}, mesh=given.mesh, eval=given.eval)
            config.global_batch_size = given.global_batch_size
        config.data.data_dir = data_dir or config.data.data_dir
        config.eval.batch_size = config.eval.batch_size or config.global_batch_size
    if config.eval.batch_size < 1:
        raise ConfigError(f"a batch of {config.eval.batch_size} images; raise eval.batch_size to at least 1")
    return config


def split_expression(config: ConfigDict, flag: str, value: str) -> str:
    """The split that `--<flag>=<value>` names: train, val or test of the config, or an expression as it is."""
    split = config.data[f"{value}_split"] if value in ("train", "val", "test") else value
    if not split:
        raise ConfigError(f"--{flag}={value}: data.{value}_split is ''; name a split expression")
    return split


def prepare(
    source: pretrained.Pretrained, config: ConfigDict, kinds: Sequence[str], block: int | None = None
) -> Callable[[Dataset], Iterator[Columns]]:
    """A function of a dataset to the columns of batch after batch, whole on every process.

    Columns are each of `kinds`, as `encoder.make_encode` has them, `label` and `index`, n rows each. Padding and
    unreadable images are left out.
    """
    mesh = make_mesh(config.mesh.to_dict(), jax.devices())
    shardings = sharding.param_shardings(mesh, needed_shapes(source))
    batch_sharding = sharding.batch_sharding(mesh)
    shards = sharding.num_batch_shards(mesh)
    batch_size = math.ceil(config.eval.batch_size / shards) * shards
    step = make_feature_step(config, mesh, shardings, batch_size, kinds, block)
    loaded: list[Any] = []  # the parameters, once they are needed

    def fetch(part: Any) -> Columns:
        columns = multihost_utils.process_allgather(part, tiled=True)
        real = columns.pop("weight") > 0
        return {name: column[real] for name, column in columns.items()}

    def compute(dataset: Dataset) -> Iterator[Columns]:
        with jax.set_mesh(mesh):
            if not loaded:
                loaded.append(source.load(shardings))
            waiting = None  # one behind: the device computes the next while this one is fetched and written
            for batch in evaluate.global_batches(dataset, batch_sharding, batch_size):
                part = {**step(loaded[0], batch), **{name: batch[name] for name in ("label", "index", "weight")}}
                if waiting is not None:
                    yield fetch(waiting)
                waiting = part
            if waiting is not None:
                yield fetch(waiting)

    return compute


def whole(batches: Iterator[Columns], kind: str) -> Columns:
    """`features` float32 (N, D) and `label` int32 (N,) of all batches."""
    parts = list(batches)
    return {
        "features": np.concatenate([part[kind] for part in parts]),
        "label": np.concatenate([part["label"] for part in parts]),
    }
