"""Classifies images by a fine-tuned model or a probe: `python -m mae_dist.predict --workdir S --images D --out F.csv`.

S is the workdir of a run, a classifier of `mae_dist.convert` or in Hugging Face's layout, a file in timm's, or one of
these on the Hugging Face hub, as `hf://OWNER/NAME`. F.csv has a row `file,class,probability` for each image, in the
order of their names; with --top k the k most likely classes of each, in k rows. Files that do not decode are left out
and named. What a spreadsheet would take for a formula, by its first character, begins with ./ (a file) or ' (a class).
"""

import contextlib
import csv
from collections import Counter
from collections.abc import Sequence

import numpy as np
from absl import flags, logging

from mae_dist import cli, errors, readable
from mae_dist.cpu import start
from mae_dist.evaluation import extract, own_images, predictions
from mae_dist.parallel import processes
from mae_dist.storage import appearing, storage_errors
from mae_dist.weights import pretrained

_WORKDIR = flags.DEFINE_string("workdir", None, "Where the classifier is.", allow_override=True)
_IMAGES = flags.DEFINE_string("images", None, own_images.HELP, allow_override=True)
_OUT = flags.DEFINE_string("out", None, "The CSV file to write.", allow_override=True)
_TOP = flags.DEFINE_integer("top", 1, "The number of classes to write of each image.", lower_bound=1)

_COUNTED = 20  # classes, in the line at the end
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a cell begins that a spreadsheet would compute


def predict(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    cli.refuse_arguments(argv)
    workdir, images, out_value = (cli.required(flag) for flag in (_WORKDIR, _IMAGES, _OUT))
    start.use_all_cores(cli.given_config(), single_process=cli.is_single_process())
    cli.join_processes()
    out = cli.new_local_path(out_value)
    source = pretrained.open_source(workdir, cli.given_config())
    dataset = own_images.open_images(images, source.config)
    compute = predictions.prepare(source, extract.with_devices(source, cli.given_config(), dataset.num_examples))
    class_names = predictions.class_names(source)
    labels = [_inert(name, "'") for name in class_names]
    logging.info("%s; %d images of %s", readable.path(source.origin), dataset.num_examples, images)
    found: list[int] = []
    first: Counter[str] = Counter()
    # Only the first process writes: on another machine, a process may have the same process id.
    with appearing(out) if processes.is_primary() else contextlib.nullcontext(out) as temporary:
        rows = []
        for columns in compute(dataset):
            likely = predictions.probabilities(columns["logits"])
            order = np.argsort(-likely, axis=1, kind="stable")[:, : _TOP.value]  # (n, k)
            for index, probability, classes in zip(columns["index"].tolist(), likely, order.tolist(), strict=True):
                found.append(index)
                first[class_names[classes[0]]] += 1
                name = _inert(dataset.file_name(index), "./")
                rows += [(name, labels[number], f"{probability[number]:.6g}") for number in classes]
        own_images.report_skipped(dataset, found)
        if processes.is_primary():
            with storage_errors(out), open(temporary, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("file", "class", "probability"), *rows])
    if processes.is_primary():
        counts = [f"{name}: {count}" for name, count in first.most_common(_COUNTED)]
        more = f" and {len(first) - _COUNTED} more classes" if len(first) > _COUNTED else ""
        print(f"{readable.path(source.origin)}: {len(found)} images in {readable.path(out)}; {', '.join(counts)}{more}")
    return errors.EXIT_DONE


def _inert(text: str, prefix: str) -> str:
    """Returns a cell that no spreadsheet computes: with `prefix` if it would be a formula."""
    return f"{prefix}{text}" if text.startswith(_FORMULA) else text


if __name__ == "__main__":
    cli.run(predict)
