"""Writes the features of a split: `python -m mae_dist.features --workdir W --out F [--split test] [--kinds mean,cls]`.

W is the workdir of a run, a directory of `mae_dist.convert` or in Hugging Face's layout, or a file in timm's; the
images are those of W's config, or of --config. F becomes a directory of shards and `features.json`, which says what is
in them; it appears when all of it is written. Every readable image is in it once, nothing masked, nothing random.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from mae_dist import distributed, encoder, errors, evaluate, job, main, patches, pretrained, sharding
from mae_dist.data import Dataset
from mae_dist.storage import absolute, appearing, naming_faults

_WORKDIR = flags.DEFINE_string("workdir", None, "Where the encoder is.", allow_override=True)
_OUT = flags.DEFINE_string("out", None, "The directory to write.", allow_override=True)
_SPLIT = flags.DEFINE_string(
    "split", "test", "train, val or test of the config, or an expression such as train[:10%].", allow_override=True
)
_KINDS = flags.DEFINE_list("kinds", ["mean"], f"What to write, of {', '.join(encoder.KINDS)}.")
_BLOCK = flags.DEFINE_integer("block", None, "Of which block's output, from 1; by default the last, normalised.")
_FORMAT = flags.DEFINE_enum("format", "npz", ["npz", "parquet"], "Of the shards.")
_SHARD_SIZE = flags.DEFINE_integer("shard_size", 10_000, "Examples in a shard.", lower_bound=1)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where TFDS keeps data sets, if not where the config says.", allow_override=True
)

Columns = dict[str, np.ndarray]


def features(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    del argv
    workdir, out_value = main.required(_WORKDIR), main.required(_OUT)
    split, _ = main.required(_SPLIT), main.required(_KINDS)
    main.use_all_cores(main.given_config())
    main.join_processes()
    out = main.new_local_path(out_value)
    source = pretrained.open_pretrained(absolute(workdir), main.default_config(), main.given_config())
    if not source.names_data:
        raise errors.ConfigError(f"{source.origin} does not say which images to take; give --config with their data")
    config = _with_data(source.config, main.given_config())
    compute = _prepare(source, config)  # refuses what the model has not, before data are opened
    if split in ("train", "val", "test"):
        split = config.data[f"{split}_split"]
    if not split:
        raise errors.ConfigError(f"--split={_SPLIT.value}: data.{_SPLIT.value}_split is ''; name a split expression")
    dataset = job.open_dataset(config, split)
    logging.info("%s; %d images of %s", source.origin, dataset.num_examples, split)
    # Only the first process writes: on another machine, a process may have the same number.
    with appearing(out) if distributed.is_primary() else contextlib.nullcontext(out) as temporary:
        files = list(_write_shards(temporary, compute(dataset), dataset))
        if distributed.is_primary():
            description = _describe(source, config, dataset, split, files)
            with naming_faults(out):
                (temporary / "features.json").write_text(json.dumps(description, indent=2) + "\n")
    if distributed.is_primary():
        print(f"{source.origin}: features of {sum(file['count'] for file in files)} images of {split} in {out}")
    return errors.EXIT_DONE


def _with_data(config: ConfigDict, given: ConfigDict | None) -> ConfigDict:
    """The model's config with data, mesh and batch size of the one that was given; scaling stays the model's."""
    with config.unlocked():
        if given is None:
            config.mesh.update(data=-1, fsdp=1, tensor=1)
        else:
            scaling = {name: config.data[name] for name in ("mean", "std")}
            config.update(data={**given.data.to_dict(), **scaling}, mesh=given.mesh, eval=given.eval)
            config.global_batch_size = given.global_batch_size
        config.data.data_dir = _DATA_DIR.value or config.data.data_dir
        config.eval.batch_size = config.eval.batch_size or config.global_batch_size
    if config.eval.batch_size < 1:
        raise errors.ConfigError(f"a batch of {config.eval.batch_size} images; raise eval.batch_size to at least 1")
    return config


def _prepare(source: pretrained.Pretrained, config: ConfigDict) -> Callable[[Dataset], Iterator[Columns]]:
    """A function of a dataset to the columns of batch after batch, whole on every process.

    Padding and unreadable images are left out.
    """
    mesh = sharding.make_mesh(config.mesh.to_dict(), jax.devices())
    shardings = sharding.param_shardings(mesh, encoder.needed_shapes(source))
    batch_sharding = sharding.batch_sharding(mesh)
    shards = sharding.num_batch_shards(mesh)
    batch_size = math.ceil(config.eval.batch_size / shards) * shards
    step = encoder.make_feature_step(config, mesh, shardings, batch_size, _KINDS.value, _BLOCK.value)

    def fetch(part: Any) -> Columns:
        columns = multihost_utils.process_allgather(part, tiled=True)
        real = columns.pop("weight") > 0
        return {name: column[real] for name, column in columns.items()}

    def compute(dataset: Dataset) -> Iterator[Columns]:
        with jax.set_mesh(mesh):
            params = source.load(shardings)
            waiting = None  # one behind: the device computes the next while this one is fetched and written
            for batch in evaluate.global_batches(dataset, batch_sharding, batch_size):
                part = {**step(params, batch), **{name: batch[name] for name in ("label", "index", "weight")}}
                if waiting is not None:
                    yield fetch(waiting)
                waiting = part
            if waiting is not None:
                yield fetch(waiting)

    return compute


def _write_shards(directory: epath.Path, batches: Iterator[Columns], dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Writes full shards as soon as they are; yields the name and count of each. Only the first process writes."""
    if distributed.is_primary():
        with naming_faults(directory):
            directory.mkdir()
    left: list[Columns] = []
    count = number = 0

    def shard(size: int) -> dict[str, Any]:
        nonlocal left, count, number
        columns = {name: np.concatenate([part[name] for part in left]) for name in left[0]}
        file = f"{number:05d}.{_FORMAT.value}"
        if distributed.is_primary():
            with naming_faults(directory / file):
                _write_shard(directory / file, {name: column[:size] for name, column in columns.items()}, dataset)
        left, count, number = [{name: column[size:] for name, column in columns.items()}], count - size, number + 1
        return {"name": file, "count": size}

    for columns in batches:
        left.append(columns)
        count += len(columns["label"])
        while count >= _SHARD_SIZE.value:
            yield shard(_SHARD_SIZE.value)
    if count:
        yield shard(count)


def _write_shard(path: epath.Path, columns: Columns, dataset: Dataset) -> None:
    """One file: `.npz` with an array per column, or Parquet with the values of an example flat in one list."""
    if path.suffix == ".npz":
        with path.open("wb") as file:
            np.savez(file, **dict[str, Any](columns))
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {}
    for name, column in columns.items():
        if column.ndim == 1:
            arrays[name] = pa.array(column)
        else:
            flat = column.reshape(len(column), -1)
            arrays[name] = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])
    arrays["class"] = pa.array([dataset.class_names[label] for label in columns["label"]])
    pq.write_table(pa.table(arrays), os.fspath(path))


def _describe(
    source: pretrained.Pretrained, config: ConfigDict, dataset: Dataset, split: str, files: list[dict[str, Any]]
) -> dict[str, Any]:
    """What features.json says."""
    model = config.model
    grid = patches.grid_size(model.image_size, model.patch_size)
    shapes = {"mean": [model.embed_dim], "cls": [model.embed_dim], "patches": [*grid, model.embed_dim]}
    return {
        "encoder": source.origin,
        "data": {"source": config.data.source, "name": config.data.name, "split": split},
        "block": _BLOCK.value,
        "shapes": {kind: shapes[kind] for kind in _KINDS.value},
        "count": sum(file["count"] for file in files),
        "class_names": list(dataset.class_names),
        "files": files,
    }


if __name__ == "__main__":
    main.run(features)
