"""Pictures of a masked autoencoder: original, masked, reconstruction, reconstruction with visible patches."""

import contextlib
import math
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mae_dist.data import Dataset, FirstExamples
from mae_dist.errors import DataFault
from mae_dist.evaluation.evaluate import columns, first_rows
from mae_dist.model.build import Params
from mae_dist.parallel.shardings import num_batch_shards
from mae_dist.storage import storage_errors, write_bytes_atomically
from mae_dist.tasks.base import Batch

COLUMNS = ("original", "masked", "reconstruction", "with_visible")
_TITLES = ("original", "masked", "reconstruction", "reconstruction\nwith visible patches")


def reconstruct(
    reconstruct_step: Callable[[Params, Batch], dict[str, jax.Array]],
    params: Params,
    dataset: Dataset,
    sharding: jax.sharding.NamedSharding,
    num_images: int,
    seed: int,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Reconstructs the first `num_images` of a split under its fixed masks, which `seed` decides.

    Returns:
      For each of `COLUMNS` float32 (n, H, W, C), on every host; and the images' classes, or the names of their files.
    """
    shards = num_batch_shards(sharding.mesh)
    size = math.ceil(min(num_images, dataset.num_examples) / shards) * shards
    # Images that do not decode are passed over, as in evaluation; a few more are read to make up for them.
    candidates = FirstExamples(dataset, 2 * num_images)
    with contextlib.closing(columns(reconstruct_step, params, candidates, sharding, size, seed)) as batches:
        found = first_rows(batches, num_images)
    if not len(found["label"]):
        raise DataFault(f"none of the first {candidates.num_examples} images of the split decodes")
    names = [
        dataset.class_names[label] if label >= 0 else os.path.basename(dataset.file_name(int(index)))
        for label, index in zip(found["label"], found["index"], strict=True)
    ]
    return {name: found[name] for name in COLUMNS}, names


def note_on_moments(config: ConfigDict) -> str:
    """Returns where pictures take the mean and deviation that `norm_pix_loss` does not predict from; "" without it."""
    if not config.pretrain.norm_pix_loss:
        return ""
    if config.pictures.pix_stats == "visible":
        return "with the mean and deviation of removed patches estimated from the visible ones"
    return "with the true mean and deviation of removed patches, which the model does not predict"


def as_shown(images: dict[str, np.ndarray], config: ConfigDict) -> dict[str, np.ndarray]:
    """Turns the columns that `reconstruct` returns into pictures that a person can see.

    By `config.pictures`: `channels` chooses three bands, or one; `stretch` maps 2 % to 98 % of each original's values,
    band by band, to black and white, in all of its columns alike.

    Returns:
      float32 (n, H, W, 3) or (n, H, W, 1) in 0..1.
    """
    options, count = config.pictures, config.model.channels
    bands = list(options.channels or (range(3) if count >= 3 else range(1)))
    shown = {name: column[..., bands] for name, column in images.items()}
    if options.stretch == "percentile" or (options.stretch == "auto" and config.data.dtype in ("uint16", "float32")):
        low, high = np.percentile(shown["original"], (2, 98), axis=(1, 2), keepdims=True)  # (n, 1, 1, c)
        span = np.where(high > low, high - low, 1)
        shown = {name: (column - low) / span for name, column in shown.items()}
    return {name: np.clip(column, 0, 1).astype(np.float32) for name, column in shown.items()}


def draw_grid(images: dict[str, np.ndarray], names: Sequence[str], title: str) -> np.ndarray:
    """Draws one row per image with its class name, one column per kind: uint8 (height, width, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(names)
    pairs = 2 if count > 1 else 1  # two images side by side keep the grid near square
    rows = math.ceil(count / pairs)
    figure = Figure(figsize=(1.35 * 4 * pairs, 1.35 * rows + 0.8), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = np.asarray(figure.subplots(rows, 4 * pairs, squeeze=False))
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.set_frame_on(False)
    for i, name in enumerate(names):
        row, left = i % rows, 4 * (i // rows)
        for column, kind in enumerate(COLUMNS):
            axis = axes[row, left + column]
            image = images[kind][i]
            axis.imshow(np.broadcast_to(image, (*image.shape[:2], 3)), vmin=0, vmax=1, interpolation="nearest")
            if row == 0:
                axis.set_title(_TITLES[column], fontsize=8)
        axes[row, left].set_ylabel(name, fontsize=9)
    figure.suptitle(title, fontsize=10)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def write_png(path: epath.Path, image: np.ndarray) -> None:
    """Writes uint8 (height, width, 3) as a PNG, whole or not at all."""
    import cv2

    ok, encoded = cv2.imencode(".png", image[..., ::-1])
    assert ok
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomically(path, encoded.tobytes())
