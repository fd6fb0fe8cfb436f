"""Writes the features of a split: `python -m mae_dist.features --workdir W --out F [--split test] [--kinds mean,cls]`.

W is the workdir of a run, a directory of `mae_dist.convert` or in Hugging Face's layout, or a file in timm's; the
images are those of W's config, or of --config. F becomes a directory of shards and `features.json`, which describes
them; it appears when it is complete. Every readable image is in it once, with nothing masked and nothing random.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags, logging
from etils import epath
from ml_collections import ConfigDict

from mae_dist import cli, errors
from mae_dist.cpu import start
from mae_dist.data import Dataset
from mae_dist.data.from_config import open_dataset
from mae_dist.evaluation import extract
from mae_dist.evaluation.encode import KINDS
from mae_dist.evaluation.evaluate import Columns
from mae_dist.model import patches
from mae_dist.parallel import processes
from mae_dist.storage import absolute, appearing, storage_errors
from mae_dist.weights import pretrained

_WORKDIR = flags.DEFINE_string("workdir", None, "Where the encoder is.", allow_override=True)
_OUT = flags.DEFINE_string("out", None, "The directory to write.", allow_override=True)
_SPLIT = flags.DEFINE_string(
    "split", "test", "train, val or test of the config, or an expression such as train[:10%].", allow_override=True
)
_KINDS = flags.DEFINE_list("kinds", ["mean"], f"The features to write, of {', '.join(KINDS)}.")
_BLOCK = flags.DEFINE_integer("block", None, "The block to write the output of, from 1; default: the last, normalised.")
_FORMAT = flags.DEFINE_enum("format", "npz", ["npz", "parquet"], "The format of the shards.")
_SHARD_SIZE = flags.DEFINE_integer("shard_size", 10_000, "Examples in a shard.", lower_bound=1)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where TFDS keeps data sets, if not where the config says.", allow_override=True
)


def features(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    del argv
    workdir, out_value = cli.required(_WORKDIR), cli.required(_OUT)
    split, _ = cli.required(_SPLIT), cli.required(_KINDS)
    start.use_all_cores(cli.given_config(), single_process=cli.is_single_process())
    cli.join_processes()
    out = cli.new_local_path(out_value)
    source = pretrained.open_pretrained(absolute(workdir), cli.given_config())
    config = extract.with_data(source, cli.given_config(), _DATA_DIR.value)
    # Raises for features that the model does not have, before data are opened.
    compute = extract.prepare(source, config, _KINDS.value, _BLOCK.value)
    split = extract.split_expression(config, "split", split)
    dataset = open_dataset(config, split)
    logging.info("%s; %d images of %s", source.origin, dataset.num_examples, split)
    # Only the first process writes: on another machine, a process may have the same process id.
    with appearing(out) if processes.is_primary() else contextlib.nullcontext(out) as temporary:
        files = _write_shards(temporary, compute(dataset), dataset)
        if processes.is_primary():
            description = _describe(source, config, dataset, split, files)
            with storage_errors(out):
                (temporary / "features.json").write_text(json.dumps(description, indent=2) + "\n")
    if processes.is_primary():
        print(f"{source.origin}: features of {sum(file['count'] for file in files)} images of {split} in {out}")
    return errors.EXIT_DONE


def _write_shards(directory: epath.Path, batches: Iterator[Columns], dataset: Dataset) -> list[dict[str, Any]]:
    """Writes each shard as soon as it is full; returns their names and counts. Only the first process writes."""
    if processes.is_primary():
        with storage_errors(directory):
            directory.mkdir()
    files = []
    for number, columns in enumerate(_shards(batches, _SHARD_SIZE.value)):
        name = f"{number:05d}.{_FORMAT.value}"
        if processes.is_primary():
            with storage_errors(directory / name):
                _write_shard(directory / name, columns, dataset)
        files.append({"name": name, "count": len(columns["label"])})
    return files


def _shards(batches: Iterator[Columns], size: int) -> Iterator[Columns]:
    """Yields the examples of all batches, `size` at a time."""
    left: list[Columns] = []
    for batch in batches:
        left.append(batch)
        while sum(len(part["label"]) for part in left) >= size:
            columns = _concatenate(left)
            yield {name: column[:size] for name, column in columns.items()}
            left = [{name: column[size:] for name, column in columns.items()}]
    if any(len(part["label"]) for part in left):
        yield _concatenate(left)


def _concatenate(parts: list[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _write_shard(path: epath.Path, columns: Columns, dataset: Dataset) -> None:
    """Writes `.npz` with an array per column, or Parquet with the values of an example flat in one list."""
    if path.suffix == ".npz":
        with path.open("wb") as file:
            np.savez(file, **dict[str, Any](columns))
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {name: pa.array(column.reshape(-1)) for name, column in columns.items()}
    for name, column in columns.items():
        if column.ndim > 1:
            arrays[name] = pa.FixedSizeListArray.from_arrays(arrays[name], column[0].size)
    arrays["class"] = pa.array([dataset.class_names[label] for label in columns["label"]])
    pq.write_table(pa.table(arrays), os.fspath(path))


def _describe(
    source: pretrained.Pretrained, config: ConfigDict, dataset: Dataset, split: str, files: list[dict[str, Any]]
) -> dict[str, Any]:
    """Returns the content of features.json."""
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
    cli.run(features)
