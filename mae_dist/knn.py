"""Classifies by a trained encoder's features: `python -m mae_dist.knn --workdir S [--k 20] [--temperature 0.07]`.

Top-1 accuracy of the test split against the training split by weighted nearest neighbours (Wu et al. 2018) and by ridge
regression, on features of whole images; nothing is trained. S is the workdir of a run, a directory of
`mae_dist.convert` or in Hugging Face's layout, or a file in timm's; the images are those of S's config, or of --config.
"""

import json
from collections.abc import Sequence

import numpy as np
from absl import flags, logging

from mae_dist import cli, errors
from mae_dist.cpu import start
from mae_dist.data.from_config import open_dataset
from mae_dist.evaluation import evaluate, extract, knn_ridge
from mae_dist.parallel import processes
from mae_dist.storage import absolute
from mae_dist.weights import pretrained

_WORKDIR = flags.DEFINE_string("workdir", None, "Where the encoder is.", allow_override=True)
_K = flags.DEFINE_integer("k", 20, "The number of neighbours that vote.")
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


def knn(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    del argv
    workdir = cli.required(_WORKDIR)
    for flag in (_K, _TEMPERATURE, _RIDGE):
        if not 0 < flag.value < np.inf:
            raise errors.ConfigError(f"--{flag.name}={flag.value} must be above 0")
    start.use_all_cores(cli.given_config(), single_process=cli.is_single_process())
    cli.join_processes()
    source = pretrained.open_pretrained(absolute(workdir), cli.given_config())
    config = extract.with_data(source, cli.given_config(), _DATA_DIR.value)
    compute = extract.prepare(source, config, [_KIND.value])
    train, test = (
        open_dataset(config, extract.split_expression(config, flag.name, flag.value))
        for flag in (_TRAIN_SPLIT, _TEST_SPLIT)
    )
    logging.info("%s; %d images against %d", source.origin, test.num_examples, train.num_examples)
    columns = [evaluate.collect(compute(dataset), _KIND.value) for dataset in (train, test)]
    options = {"k": _K.value, "temperature": _TEMPERATURE.value, "ridge": _RIDGE.value}
    found = knn_ridge.top1(*columns, num_classes=train.num_classes, **options)
    if processes.is_primary():
        counts = {"num_train": len(columns[0]["label"]), "num_test": len(columns[1]["label"])}
        if _JSON.value:
            print(json.dumps({"encoder": source.origin, **found, **counts, "kind": _KIND.value, **options}))
        else:
            print(
                f"{source.origin}: kNN top-1 {found['knn_top1']:.4f} (k={_K.value}, T={_TEMPERATURE.value:g}), ridge "
                f"top-1 {found['ridge_top1']:.4f}; {counts['num_test']} images against {counts['num_train']}"
            )
    return errors.EXIT_DONE


if __name__ == "__main__":
    cli.run(knn)
