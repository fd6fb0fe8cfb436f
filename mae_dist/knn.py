"""Finds similar images, or classifies, by a trained encoder's features: `python -m mae_dist.knn --workdir S`.

S is the workdir of a run, a directory of `mae_dist.convert` or in Hugging Face's layout, a file in timm's, or one of
these on the Hugging Face hub, as `hf://OWNER/NAME`. Features are of whole images; nothing is trained.

python -m mae_dist.knn --workdir S --images queries --against photos --k 5 --out F.png

prints a line for each query with the names and cosine similarities of the images nearest to it, and draws the first 12
queries with up to 12 of theirs. Without --against the queries are compared with each other.

Without --images it prints the top-1 accuracy of the test split against the training split, by weighted nearest
neighbours (Wu et al. 2018) and by ridge regression; the images are those of S's config, or of --config, with labels.
"""

import json
import os
from collections.abc import Sequence

import numpy as np
from absl import flags, logging

from mae_dist import cli, errors, readable
from mae_dist.cpu import start
from mae_dist.data import Dataset
from mae_dist.data.from_config import open_dataset
from mae_dist.evaluation import evaluate, extract, knn_ridge, own_images, pictures
from mae_dist.parallel import processes
from mae_dist.storage import absolute
from mae_dist.weights import pretrained

_WORKDIR = flags.DEFINE_string("workdir", None, "Where the encoder is.", allow_override=True)
_IMAGES = flags.DEFINE_string("images", None, own_images.HELP, allow_override=True)
_AGAINST = flags.DEFINE_string(
    "against",
    None,
    "Where to search for the neighbours, named as --images; default: among these.",
    allow_override=True,
)
_OUT = flags.DEFINE_string("out", None, "The PNG of the neighbours of --images.", allow_override=True)
_K = flags.DEFINE_integer("k", None, "The number of neighbours: of each of --images (5), or that vote (20).")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.07, "A vote counts exp(cosine similarity / temperature).")
_RIDGE = flags.DEFINE_float("ridge", 1e-3, "Penalty of the regression, for each example's squared error.")
_TRAIN_SPLIT = flags.DEFINE_string(
    "train_split", "train", "train, val or test of the config, or an expression such as train[:10%]."
)
_TEST_SPLIT = flags.DEFINE_string("test_split", "test", "The split to classify; as --train_split.")
_KIND = flags.DEFINE_enum("kind", "mean", ["mean", "cls"], "Features: mean over patches, or the class token.")
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where TFDS keeps data sets, if not where the config says.", allow_override=True
)
_JSON = flags.DEFINE_bool("json", False, "Prints one JSON object instead of a sentence.", allow_override=True)


_DRAWN = 12  # queries and neighbours of each, at most


def knn(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    cli.refuse_arguments(argv)
    workdir = cli.required(_WORKDIR)
    for flag in (_K, _TEMPERATURE, _RIDGE):
        if flag.value is not None and not 0 < flag.value < np.inf:
            raise errors.ConfigError(f"--{flag.name}={flag.value} must be above 0")
    if not _IMAGES.value and (_AGAINST.value or _OUT.value):
        raise errors.ConfigError("--against and --out are for the neighbours of --images; give these too")
    start.use_all_cores(cli.given_config(), single_process=cli.is_single_process())
    cli.join_processes()
    source = pretrained.open_source(workdir, cli.given_config())
    return _search(source) if _IMAGES.value else _classify(source)


def _search(source: pretrained.Pretrained) -> int:
    """Prints and draws the neighbours of the images of --images."""
    queries = own_images.open_images(cli.required(_IMAGES), source.config)
    others = own_images.open_images(_AGAINST.value, source.config) if _AGAINST.value else queries
    config = extract.with_devices(source, cli.given_config(), max(queries.num_examples, others.num_examples))
    compute = extract.prepare(source, config, [_KIND.value])
    logging.info("%s; %d images against %d", readable.path(source.origin), queries.num_examples, others.num_examples)
    computed = {dataset: _features(compute, dataset) for dataset in dict.fromkeys((queries, others))}
    (features, index), (against, numbers) = computed[queries], computed[others]
    if others is queries and len(index) < 2:
        raise errors.ConfigError(f"--images={_IMAGES.value} is one image; say by --against what to compare it with")
    found, similarity = knn_ridge.neighbours(against, None if others is queries else features, _K.value or 5)
    found = numbers[found]
    if processes.is_primary():
        neighbours = {
            queries.file_name(query): {others.file_name(number): round(float(cosine), 4) for number, cosine in pairs}
            for query, pairs in zip(index.tolist(), map(zip, found.tolist(), similarity.tolist()), strict=True)
        }
        if _JSON.value:
            print(json.dumps({"encoder": source.origin, "neighbours": neighbours, "kind": _KIND.value}))
        else:
            for query, near in neighbours.items():
                print(f"{query}: {', '.join(f'{name} ({cosine:.2f})' for name, cosine in near.items())}")
        if _OUT.value:
            _draw(source, queries, index[:_DRAWN], others, found[:_DRAWN, :_DRAWN], similarity)
    return errors.EXIT_DONE


def _features(compute: extract.Compute, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Returns the features of the images that decode, and the numbers of these; names the others."""
    batches = list(compute(dataset))
    index = np.concatenate([batch["index"] for batch in batches])
    own_images.report_skipped(dataset, index.tolist())
    return np.concatenate([batch[_KIND.value] for batch in batches]), index


def _draw(
    source: pretrained.Pretrained,
    queries: Dataset,
    index: np.ndarray,
    others: Dataset,
    found: np.ndarray,
    similarity: np.ndarray,
) -> None:
    """Draws the queries of the numbers `index` (q,), and the images of the numbers `found` (q, k) beside them."""
    out = absolute(cli.required(_OUT))
    images = pictures.of_dataset(others, found.ravel(), source.config)
    captions = [
        [f"{pictures.shorten(_name(others, number))}\n{cosine:.2f}" for number, cosine in zip(*row, strict=False)]
        for row in zip(found.tolist(), similarity.tolist(), strict=False)
    ]
    grid = pictures.draw_neighbours(
        pictures.of_dataset(queries, index, source.config),
        [pictures.shorten(_name(queries, number)) for number in index.tolist()],
        images.reshape(*found.shape, *images.shape[1:]),
        captions,
        f"nearest by cosine similarity\nof {_KIND.value} features",
    )
    pictures.write_png(out, grid)
    drawn = f"{len(index)} of {queries.num_examples} queries, each with its nearest images"
    print(f"{readable.path(source.origin)}: {drawn}, in {readable.path(out)}")


def _name(dataset: Dataset, number: int) -> str:
    return os.path.basename(dataset.file_name(number))


def _classify(source: pretrained.Pretrained) -> int:
    """Prints the accuracy of the test split against the training split."""
    config = extract.with_data(source, cli.given_config(), _DATA_DIR.value)
    compute = extract.prepare(source, config, [_KIND.value])
    train = open_dataset(config, extract.split_expression(config, _TRAIN_SPLIT.name, _TRAIN_SPLIT.value))
    if train.num_classes < 2:
        raise errors.ConfigError(
            f"--train_split={_TRAIN_SPLIT.value} has labels of {train.num_classes} classes, and an accuracy needs two; "
            "find the images most like some of your own with --images"
        )
    test = open_dataset(config, extract.split_expression(config, _TEST_SPLIT.name, _TEST_SPLIT.value))
    logging.info("%s; %d images against %d", readable.path(source.origin), test.num_examples, train.num_examples)
    columns = [evaluate.collect(compute(dataset), _KIND.value) for dataset in (train, test)]
    options = {"k": _K.value or 20, "temperature": _TEMPERATURE.value, "ridge": _RIDGE.value}
    found = knn_ridge.top1(*columns, num_classes=train.num_classes, **options)
    if not found:
        raise errors.DataFault(f"none of the images of --test_split={_TEST_SPLIT.value} has a label; name another")
    if processes.is_primary():
        counts = {"num_train": len(columns[0]["label"]), "num_test": len(columns[1]["label"])}
        if _JSON.value:
            print(json.dumps({"encoder": source.origin, **found, **counts, "kind": _KIND.value, **options}))
        else:
            print(
                f"{readable.path(source.origin)}: kNN top-1 {found['knn_top1']:.4f} (k={options['k']}, "
                f"T={_TEMPERATURE.value:g}), ridge top-1 {found['ridge_top1']:.4f}; "
                f"{counts['num_test']} images against {counts['num_train']}"
            )
    return errors.EXIT_DONE


if __name__ == "__main__":
    cli.run(knn)
