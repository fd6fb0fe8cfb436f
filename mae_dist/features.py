"""Writes the features of images: `python -m mae_dist.features --workdir W --out F [--split test] [--kinds mean,cls]`.

W is the workdir of a run, a directory of `mae_dist.convert` or in Hugging Face's layout, a file in timm's, or one of
these on the Hugging Face hub, as `hf://OWNER/NAME`; the images are those of W's config, or of --config, or your own:

python -m mae_dist.features --workdir W --images photos --out F.parquet

An F that ends in .parquet or .npz is one file, and all features are in memory before it is written. Any other F becomes
a directory of shards, written one after another, and `features.json`, which describes them. Either appears when it is
complete. Every readable image is in it once, with nothing masked and nothing random. Columns: `file`, the image's name,
where it is known; of a split also `index`, `label` and `class`; and a column for each of --kinds.
"""

import contextlib
import json
import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags, logging
from etils import epath
from ml_collections import ConfigDict

from mae_dist import cli, errors, readable
from mae_dist.cpu import start
from mae_dist.data import Dataset
from mae_dist.data.from_config import open_dataset
from mae_dist.evaluation import extract, own_images
from mae_dist.evaluation.encode import KINDS
from mae_dist.evaluation.evaluate import Columns
from mae_dist.model import patches
from mae_dist.parallel import processes
from mae_dist.storage import appearing, storage_errors
from mae_dist.weights import pretrained

_WORKDIR = flags.DEFINE_string("workdir", None, "Where the encoder is.", allow_override=True)
_OUT = flags.DEFINE_string(
    "out", None, "What to write: a file, F.parquet or F.npz, or else a directory of shards.", allow_override=True
)
_IMAGES = flags.DEFINE_string("images", None, own_images.HELP, allow_override=True)
_SPLIT = flags.DEFINE_string(
    "split",
    None,
    "train, val or test of the config, or an expression such as train[:10%] (default: test, or val without one).",
    allow_override=True,
)
_KINDS = flags.DEFINE_list("kinds", ["mean"], f"The features to write, of {', '.join(KINDS)}.")
_BLOCK = flags.DEFINE_integer("block", None, "The block to write the output of, from 1; default: the last, normalised.")
_FORMAT = flags.DEFINE_enum("format", "npz", ["npz", "parquet"], "The format of shards; one file has its name's.")
_SHARD_SIZE = flags.DEFINE_integer("shard_size", 10_000, "Examples in a shard.", lower_bound=1)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where TFDS keeps data sets, if not where the config says.", allow_override=True
)


def features(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    cli.refuse_arguments(argv)
    workdir, out_value = cli.required(_WORKDIR), cli.required(_OUT)
    cli.required(_KINDS)
    start.use_all_cores(cli.given_config(), single_process=cli.is_single_process())
    cli.join_processes()
    out = cli.new_local_path(out_value)
    source = pretrained.open_source(workdir, cli.given_config())
    if _IMAGES.value:
        dataset = own_images.open_images(_IMAGES.value, source.config)
        config = extract.with_devices(source, cli.given_config(), dataset.num_examples)
        described = {"images": _IMAGES.value}
        compute = extract.prepare(source, config, _KINDS.value, _BLOCK.value)
    else:
        config = extract.with_data(source, cli.given_config(), _DATA_DIR.value)
        # Raises for features that the model does not have, before data are opened.
        compute = extract.prepare(source, config, _KINDS.value, _BLOCK.value)
        split = extract.split_expression(config, "split", _SPLIT.value or extract.last_split(config))
        dataset = open_dataset(config, split)
        described = {"source": config.data.source, "name": config.data.name, "split": split}
    place = _IMAGES.value or described["split"]
    logging.info("%s; %d images of %s", readable.path(source.origin), dataset.num_examples, place)
    found: list[int] = []
    batches = _columns(compute(dataset), dataset, found)
    # Only the first process writes: on another machine, a process may have the same process id.
    with appearing(out) if processes.is_primary() else contextlib.nullcontext(out) as temporary:
        if out.suffix in (".npz", ".parquet"):
            columns = _concatenate(list(batches))
            if processes.is_primary():
                with storage_errors(out):
                    _write(temporary, columns)
        else:
            files = _write_shards(temporary, batches)
            if processes.is_primary():
                with storage_errors(out):
                    description = _describe(source, config, dataset, described, files)
                    (temporary / "features.json").write_text(json.dumps(description, indent=2) + "\n")
        if _IMAGES.value:
            own_images.report_skipped(dataset, found)
    if processes.is_primary():
        print(f"{readable.path(source.origin)}: features of {len(found)} images of {place} in {readable.path(out)}")
    return errors.EXIT_DONE


def _columns(batches: Iterator[Columns], dataset: Dataset, found: list[int]) -> Iterator[Columns]:
    """Yields each batch with the names of its files and classes, where there are such; adds its images to `found`."""
    has_names = bool(dataset.file_name(0))
    for batch in batches:
        index, label = batch.pop("index"), batch.pop("label")
        found += index.tolist()
        names = {} if _IMAGES.value else {"index": index}
        if dataset.num_classes:
            names["label"] = label
        if has_names:
            names["file"] = np.array([dataset.file_name(number) for number in index.tolist()], str)
        if dataset.num_classes:
            names["class"] = np.array([dataset.class_names[number] if number >= 0 else "" for number in label], str)
        yield {**names, **batch}


def _write_shards(directory: epath.Path, batches: Iterator[Columns]) -> list[dict[str, Any]]:
    """Writes each shard as soon as it is full; returns their names and counts. Only the first process writes."""
    if processes.is_primary():
        with storage_errors(directory):
            directory.mkdir()
    files = []
    for number, columns in enumerate(_shards(batches, _SHARD_SIZE.value)):
        name = f"{number:05d}.{_FORMAT.value}"
        if processes.is_primary():
            with storage_errors(directory / name):
                _write(directory / name, columns)
        files.append({"name": name, "count": _count(columns)})
    return files


def _shards(batches: Iterator[Columns], size: int) -> Iterator[Columns]:
    """Yields the examples of all batches, `size` at a time."""
    left: list[Columns] = []
    for batch in batches:
        left.append(batch)
        while sum(map(_count, left)) >= size:
            columns = _concatenate(left)
            yield {name: column[:size] for name, column in columns.items()}
            left = [{name: column[size:] for name, column in columns.items()}]
    if any(map(_count, left)):
        yield _concatenate(left)


def _count(columns: Columns) -> int:
    return len(columns[_KINDS.value[0]])


def _concatenate(parts: list[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _write(path: epath.Path, columns: Columns) -> None:
    """Writes `.npz` with an array per column, or Parquet with the values of an example flat in one list."""
    if path.suffix == ".npz":
        with zipfile.ZipFile(path, "w") as archive:  # as `np.savez`, which cannot name an array "file"
            for name, column in columns.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, column, allow_pickle=False)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {name: pa.array(column.reshape(-1)) for name, column in columns.items()}
    for name, column in columns.items():
        if column.ndim > 1:
            arrays[name] = pa.FixedSizeListArray.from_arrays(arrays[name], math.prod(column.shape[1:]))
    pq.write_table(pa.table(arrays), os.fspath(path))


def _describe(
    source: pretrained.Pretrained,
    config: ConfigDict,
    dataset: Dataset,
    data: dict[str, str],
    files: list[dict[str, Any]],
) -> dict[str, Any]:
    """Returns the content of features.json."""
    model = config.model
    grid = patches.grid_size(model.image_size, model.patch_size)
    shapes = {"mean": [model.embed_dim], "cls": [model.embed_dim], "patches": [*grid, model.embed_dim]}
    return {
        "encoder": source.origin,
        "data": data,
        "block": _BLOCK.value,
        "shapes": {kind: shapes[kind] for kind in _KINDS.value},
        "count": sum(file["count"] for file in files),
        "class_names": list(dataset.class_names),
        "files": files,
    }


if __name__ == "__main__":
    cli.run(features)
