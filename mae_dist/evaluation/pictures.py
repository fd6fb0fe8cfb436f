"""Pictures of a masked autoencoder: original, masked, reconstruction, reconstruction with visible patches."""

import contextlib
import functools
import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mae_dist import platforms
from mae_dist.data import Dataset, FirstExamples
from mae_dist.errors import DataFault
from mae_dist.evaluation import extract
from mae_dist.evaluation.eval_step import make_eval_step
from mae_dist.evaluation.evaluate import Columns, columns, first_rows
from mae_dist.model.build import Params
from mae_dist.parallel.mesh import make_mesh
from mae_dist.parallel.shardings import num_batch_shards
from mae_dist.storage import storage_errors, write_bytes_atomically
from mae_dist.tasks.base import Batch
from mae_dist.tasks.make import make_task
from mae_dist.weights import pretrained

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("original", "masked", "reconstruction", "with_visible")
TITLES = {
    **dict(zip(COLUMNS, ("original", "masked", "reconstruction", "reconstruction\nwith visible patches"), strict=True)),
    "patches": "patch features",
}
_LONGEST_NAME = 20  # characters that fit beside an image


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
    return {name: found[name] for name in COLUMNS}, names_of(dataset, found)


def names_of(dataset: Dataset, columns: Columns) -> list[str]:
    """Returns the class of each image of a batch, or the name of its file where it has no label."""
    return [
        dataset.class_names[label] if label >= 0 else os.path.basename(dataset.file_name(int(index)))
        for label, index in zip(columns["label"], columns["index"], strict=True)
    ]


def title(config: ConfigDict, step: int) -> str:
    """Returns what reconstructions are of."""
    model, note = config.model, note_on_moments(config)
    squares = f" of {model.mask_block}x{model.mask_block} patches" if model.mask_block > 1 else ""
    text = f"{config.name}, step {step}: {model.masking} masking{squares}, ratio {model.mask_ratio:g}"
    return f"{text}\n{note}" if note else text


def prepare(source: pretrained.Pretrained, config: ConfigDict) -> extract.Compute:
    """Returns a function of a dataset to `COLUMNS` of its batches, float32 (n, H, W, C), as `reconstruct`.

    Args:
      source: a pretraining with its decoder.
      config: the source's, with mesh and `eval.batch_size`.
    """
    mesh = make_mesh(config.mesh.to_dict(), jax.devices())
    task = make_task(config, 1, platforms.make_hooks(mesh))
    assert task.reconstruct is not None, config.task
    step = functools.partial(make_eval_step, task.reconstruct, mesh=mesh, per_example=True)
    return extract.with_step(
        source, source.abstract, mesh, config.eval.batch_size, lambda shardings, _: step(params=shardings)
    )


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


def fractions(images: np.ndarray, config: ConfigDict) -> np.ndarray:
    """Returns the images of a dataset as fractions of their range. # (n, H, W, C) -> float32"""
    top = {"uint8": 255, "uint16": config.data.max_value or 65535}.get(str(images.dtype), 1)
    return images.astype(np.float32) / np.float32(top)


def of_dataset(dataset: Dataset, numbers: np.ndarray, config: ConfigDict) -> np.ndarray:
    """Returns some images of a dataset as a person can see them, float32 (n, H, W, 1 or 3) in 0..1."""
    images = dataset.examples(numbers)["image"]
    return as_shown({"original": fractions(images, config)}, config)["original"]


def draw_grid(images: dict[str, np.ndarray], names: Sequence[str], title: str) -> np.ndarray:
    """Draws one row per image with its name, one column per kind of picture: uint8 (height, width, 3).

    Args:
      images: of `COLUMNS`, "patches" and others, float32 (n, H, W, 1 or 3) in 0..1; others have their names as titles.
      names: of the images.
      title: above all.
    """
    from matplotlib.figure import Figure

    kinds = list(images)
    count = len(names)
    pairs = 2 if count > 1 and len(kinds) <= len(TITLES) else 1  # two images side by side keep the grid near square
    rows = math.ceil(count / pairs)
    figure = Figure(figsize=(1.35 * len(kinds) * pairs, 1.35 * rows + 0.8), dpi=100, layout="constrained")
    axes = np.asarray(figure.subplots(rows, len(kinds) * pairs, squeeze=False))
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.set_frame_on(False)
    for i, name in enumerate(names):
        row, left = i % rows, len(kinds) * (i // rows)
        for column, kind in enumerate(kinds):
            axis = axes[row, left + column]
            show(axis, images[kind][i])
            if row == 0:
                axis.set_title(TITLES.get(kind, kind), fontsize=8)
        axes[row, left].set_ylabel(shorten(name), fontsize=9, parse_math=False)
    figure.suptitle(title, fontsize=10)
    return _rendered(figure)


def draw_neighbours(
    queries: np.ndarray, names: Sequence[str], neighbours: np.ndarray, captions: Sequence[Sequence[str]], title: str
) -> np.ndarray:
    """Draws a row per query: its image and those most similar to it. # -> uint8 (height, width, 3)

    Args:
      queries: float32 (q, H, W, 1 or 3) in 0..1.
      names: q.
      neighbours: float32 (q, k, H, W, 1 or 3) in 0..1.
      captions: q times k; a line each, or two.
      title: above all.
    """
    from matplotlib.figure import Figure

    count, k = neighbours.shape[:2]
    figure = Figure(figsize=(1.35 * (k + 1) + 0.3, 1.65 * count + 0.6), dpi=100, layout="constrained")
    axes = np.asarray(figure.subplots(count, k + 1, squeeze=False))
    for row in range(count):
        for axis, image, caption in zip(
            axes[row], [queries[row], *neighbours[row]], [names[row], *captions[row]], strict=True
        ):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            show(axis, image)
            axis.set_xlabel(caption, fontsize=7, parse_math=False)
        axes[row, 0].spines[:].set(visible=True, color="#0072B2", linewidth=3)
    figure.suptitle(title, fontsize=10)
    return _rendered(figure)


def _rendered(figure: "Figure") -> np.ndarray:
    """Returns a figure's pixels, uint8 (height, width, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # a file's name has characters that no font here has
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def show(axis: Any, image: np.ndarray) -> None:
    """Draws an image (H, W, 1 or 3) in 0..1 into a matplotlib axis."""
    axis.imshow(np.broadcast_to(image, (*image.shape[:2], 3)), vmin=0, vmax=1, interpolation="nearest")


def shorten(name: str) -> str:
    """Returns the end of a name, in which files differ."""
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"


def write_png(path: epath.Path, image: np.ndarray) -> None:
    """Writes uint8 (height, width, 3) as a PNG, whole or not at all."""
    import cv2

    ok, encoded = cv2.imencode(".png", image[..., ::-1])
    assert ok
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomically(path, encoded.tobytes())
