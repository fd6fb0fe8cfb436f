"""Full passes over a split: every example exactly once, on any number of hosts."""

from collections.abc import Callable, Generator, Iterable, Sequence

import jax
import numpy as np
from clu import metrics as clu_metrics
from jax.experimental import multihost_utils

from mae_dist.data import Dataset, eval_batches, local_rows, to_global
from mae_dist.model.build import Params
from mae_dist.tasks.base import Batch

Columns = dict[str, np.ndarray]
MOST_CLASSES = 20  # whose accuracies are recorded one by one
NUM_LOWEST = 5  # recorded of more


def global_batches(
    dataset: Dataset, sharding: jax.sharding.Sharding, global_batch_size: int, seed: int | None = None
) -> Iterable[dict[str, jax.Array]]:
    """Yields the batches of a split in order, as global arrays; the last one padded with weight 0.

    `seed` is that of the fixed masks (see `tasks.base`).
    """
    rows = local_rows(sharding, global_batch_size)
    seeds = {} if seed is None else {"seed": np.full(len(rows), seed, np.uint32)}
    with eval_batches(dataset, global_batch_size=global_batch_size, rows=rows) as batches:
        for batch in batches:
            yield to_global({**batch, **seeds}, sharding, global_batch_size, rows)


def evaluate(
    eval_step: Callable[[Params, Batch], dict[str, clu_metrics.Metric]],
    params: Params,
    batches: Iterable[dict[str, jax.Array]],
    prefix: str,
    class_names: Sequence[str],
    after_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Returns means over all examples of `batches`, each metric's name behind `prefix` (`val_`, `test_`).

    Totals and counts are merged on the device and fetched once. Accuracies per class are named as `_by_class` says.
    `after_batch` is called after each batch; an exception that it raises ends the pass.
    """
    merged = None
    for batch in batches:
        part = eval_step(params, batch)
        jax.block_until_ready(merged)  # no more than a batch ahead of the device, so that times are real
        merged = part if merged is None else {name: merged[name].merge(part[name]) for name in part}
        after_batch()
    assert merged is not None, "an empty split is refused when it is opened"
    result = {}
    for name, metric in jax.device_get(merged).items():
        if name == "per_class":
            result |= _by_class(np.asarray(metric.compute()), f"{prefix}top1", class_names)
        else:
            result[f"{prefix}{name}"] = float(metric.compute())
    return result


def _by_class(accuracies: np.ndarray, name: str, class_names: Sequence[str]) -> dict[str, float]:
    """Returns `<name>/<class>` of each class, NaN without examples.

    Of many classes only the lowest, with `<name>_min` and `<name>_median`: not a thousand numbers in every record.
    """
    named = [(f"{name}/{label}", float(value)) for label, value in zip(class_names, accuracies, strict=True)]
    if len(named) <= MOST_CLASSES:
        return dict(named)
    lowest = sorted((pair for pair in named if not np.isnan(pair[1])), key=lambda pair: pair[1])
    summary = {f"{name}_min": lowest[0][1], f"{name}_median": float(np.nanmedian(accuracies))}
    return summary | dict(lowest[:NUM_LOWEST])


def columns(
    step: Callable[[Params, Batch], dict[str, jax.Array]],
    params: Params,
    dataset: Dataset,
    sharding: jax.sharding.Sharding,
    global_batch_size: int,
    seed: int | None = None,
) -> Generator[Columns, None, None]:
    """Yields the results of `step` for a split, batch after batch, whole on every process.

    Columns are those of `step`, (params, batch) -> arrays of one row per example, with `label` and `index`; n rows
    each. Padding and unreadable images are left out. `seed` is as in `global_batches`.
    """

    def fetch(part: dict[str, jax.Array]) -> Columns:
        fetched = multihost_utils.process_allgather(part, tiled=True)
        real = fetched.pop("weight") > 0
        return {name: column[real] for name, column in fetched.items()}

    waiting = None  # one behind: the device computes the next while this one is fetched and used
    for batch in global_batches(dataset, sharding, global_batch_size, seed):
        part = {**step(params, batch), **{name: batch[name] for name in ("label", "index", "weight")}}
        if waiting is not None:
            yield fetch(waiting)
        waiting = part
    if waiting is not None:
        yield fetch(waiting)


def first_rows(batches: Iterable[Columns], count: int) -> Columns:
    """Returns the first `count` rows of all columns, or all if there are fewer; takes no more batches than it needs."""
    parts, found = [], 0
    for batch in batches:
        parts.append(batch)
        found += len(batch["label"])
        if found >= count:
            break
    return {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}


def collect(
    batches: Iterable[Columns], kind: str = "features", after_batch: Callable[[], None] = lambda: None
) -> Columns:
    """Returns `features` float32 (N, D), the column `kind`, and `label` int32 (N,) of all batches.

    `after_batch` is called after each batch; an exception that it raises ends the pass.
    """
    features, labels = [], []
    for batch in batches:
        features.append(batch[kind].astype(np.float32))
        labels.append(batch["label"])
        after_batch()
    return {"features": np.concatenate(features), "label": np.concatenate(labels)}
