"""Pictures of models: reconstructions, predictions, confusion matrix, accuracy of each class, features in a plane."""

import base64
import collections
import io
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.patches import Rectangle
from PIL import Image

from mae_dist.evaluation.evaluate import NUM_LOWEST
from mae_dist.evaluation.pictures import show
from mae_dist.metrics.summary import last_values
from mae_dist.report.groups import Group
from mae_dist.report.model import Seen
from mae_dist.report.plot import MARKERS, Line, Plot, new_figure, shorten
from mae_dist.storage import children_of, storage_errors

_RIGHT, _WRONG = "#0072B2", "#D55E00"
_MOST_CLASSES = 30  # whose names, cells or colours can still be distinguished
# Ten that differ for colour-blind people too (Tol's muted, and one gray); beyond these, markers differ.
_CLASS_COLORS = (
    "#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499", "#8A8F98",
)  # fmt: skip
_PICTURE_WIDTH = 1000  # pixels in the page


def some_pictures(workdir: epath.Path) -> list[epath.Path]:
    """Returns at most four pictures that training drew: the first, some between, the last."""
    directory = workdir / "pictures"
    with storage_errors(directory):
        paths = [path for path in children_of(directory) if path.match("step_*.png")]
    return paths if len(paths) <= 4 else [paths[round(i * (len(paths) - 1) / 3)] for i in range(4)]


def to_data_uri(path: epath.Path) -> str:
    """Returns a run's picture, no larger than a page needs it, as a data URI.

    Raises:
      OSError: it cannot be read, or is no picture.
    """
    with Image.open(io.BytesIO(path.read_bytes())) as picture:
        image = picture.convert("RGB")
    image.thumbnail((_PICTURE_WIDTH, image.height), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.quantize(256).save(data, "PNG", optimize=True)  # a third of the bytes
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def predictions(seen: Seen, label: str) -> Plot:
    """Returns the first images of the split with their predictions."""
    assert seen.predictions is not None
    found = list(zip(seen.images, seen.labels, seen.predictions, strict=False))  # only the first have images
    right = sum(int(truth == guess) for _, truth, guess in found)
    columns = 6
    rows = math.ceil(len(found) / columns)

    figure = new_figure(0.2 + 0.95 * rows)
    panels = list(np.asarray(figure.subplots(rows, columns, squeeze=False)).flat)
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    for axes, (image, truth, guess) in zip(panels, found, strict=False):
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        show(axes, image)
        axes.spines[:].set(visible=True, color=_RIGHT if truth == guess else _WRONG, linewidth=2.2)
        true_name, name = (shorten(seen.class_names[i], 11) for i in (truth, guess))
        axes.set_title(f"✓ {name}" if truth == guess else f"✗ {name}", fontsize=7.5, pad=3)
        axes.set_xlabel("" if truth == guess else f"is {true_name}", fontsize=7.5, labelpad=2)

    alt = f"{right} of the first {len(found)} images are predicted right"
    return Plot(f"predictions_{label}", "The first images and their predictions", label, alt, figure)


def colours(seen: Seen, label: str) -> Plot:
    """Returns the first images of the split, each beside its patches in the colours of their features."""
    columns = 3
    rows = math.ceil(len(seen.patches) / columns)

    figure = new_figure(0.1 + 0.75 * rows)
    panels = np.asarray(figure.subplots(rows, 2 * columns, squeeze=False)).reshape(-1, 2)
    for axes in panels.flat:
        axes.set_axis_off()
    for pair, *images in zip(panels, seen.images, seen.patches, strict=False):
        for axes, image in zip(pair, images, strict=True):
            show(axes, image)

    alt = f"{len(seen.patches)} images, each beside its patches, coloured by three principal components of the features"
    return Plot(f"patch_features_{label}", "Patch features in colours (PCA)", label, alt, figure)


def confusion(seen: Seen, label: str) -> Plot:
    """Returns the fractions of each true class that were predicted as each class, in percent."""
    from sklearn.metrics import confusion_matrix

    assert seen.predictions is not None
    size = len(seen.class_names)
    counts = confusion_matrix(seen.labels, seen.predictions, labels=range(size))  # (true, predicted)
    percent = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    wrong = counts - np.diag(np.diag(counts))
    worst = [np.unravel_index(place, wrong.shape) for place in np.argsort(-wrong, axis=None)[:3]]
    confused = ", ".join(
        f"{seen.class_names[i]} for {seen.class_names[j]} {wrong[i, j]} times" for i, j in worst if wrong[i, j]
    )

    figure = new_figure(4.1)
    axes = figure.subplots()
    axes.grid(visible=False)
    image = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.spines[:].set_visible(False)
    if size <= _MOST_CLASSES:
        names = [shorten(name, 12) for name in seen.class_names]
        axes.set_xticks(range(size), names, rotation=90 if max(map(len, names)) > 2 else 0)
        axes.set_yticks(range(size), names)
        axes.tick_params(length=0)
    else:
        figure.colorbar(image, ax=axes, label="% of the true class", shrink=0.8)
    for i, j in np.argwhere(counts) if size <= 12 else ():
        color = "white" if percent[i, j] > 55 else "#1A1A1A"
        axes.text(j, i, f"{percent[i, j]:.0f}", ha="center", va="center", fontsize=7.5, color=color)
    axes.add_patch(Rectangle((-0.5, -0.5), size, size, fill=False, edgecolor="#8A8F98", linewidth=0.8))

    accuracy = 100 * np.trace(counts) / max(1, counts.sum())
    alt = f"Accuracy {accuracy:.2f} %. Most often confused: {confused or 'none'}"
    return Plot(f"confusion_{label}", "Confusion matrix, % of each true class", label, alt, figure)


def per_class(groups: Sequence[Group]) -> Plot | None:
    """Returns the accuracy of each class by the last evaluation, of the test split where a run evaluated it.

    Each is a mean over the seeds that recorded the class: of many classes, a run records its own lowest.
    """
    split = "test" if any(one.values("test_top1") for one in groups) else "val"
    prefix = f"{split}_top1/"
    found: dict[Line, dict[str, float]] = {}  # by entry of the legend and class, in percent
    few = False
    for one in groups:
        values = collections.defaultdict(list)
        for last in (last_values(run.records) for run in one.runs):
            few |= f"{split}_top1_min" in last
            for name, value in last.items():
                if name.startswith(prefix) and math.isfinite(value):
                    values[name.removeprefix(prefix)].append(100 * value)
        if values:
            found[one.label, one.line[1], "-"] = {label: statistics.fmean(several) for label, several in values.items()}
    if not found:
        return None
    title = f"The {NUM_LOWEST} least accurate classes of each run" if few else "Accuracy of each class"
    title = f"{title} ({split})"
    lowest: dict[str, float] = {}
    for accuracies in found.values():
        lowest |= {label: min(value, lowest.get(label, math.inf)) for label, value in accuracies.items()}
    classes = list(lowest)
    if len(classes) > _MOST_CLASSES:
        classes = sorted(classes, key=lambda label: lowest[label])[:_MOST_CLASSES]
        title += f", the lowest {_MOST_CLASSES} of them"

    figure = new_figure(0.9 + 0.23 * len(classes))
    axes = figure.subplots()
    for number, ((_, color, _), accuracies) in enumerate(found.items()):
        rows = [row for row, name in enumerate(classes) if name in accuracies]
        x, marker = [accuracies[classes[row]] for row in rows], MARKERS[number % len(MARKERS)]
        axes.plot(x, rows, marker, color=color, markersize=5.5, alpha=0.9)
    axes.set_yticks(range(len(classes)), [shorten(name, 18) for name in classes])
    axes.invert_yaxis()
    axes.set_xlabel("%")
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.05)

    (label, *_), first = next(iter(found.items()))
    worst = min(first, key=lambda name: first[name])
    alt = f"{title}. Of {label} the least accurate is {worst} with {first[worst]:.1f} %"
    return Plot("per_class", title, "", alt, figure, legend=tuple(found))


def embedding(points: np.ndarray, labels: np.ndarray, class_names: Sequence[str], label: str) -> Plot:
    """Returns features in a plane, coloured by class; with too many classes for a legend, by their order.

    Args:
      points: (n, 2). labels: int (n,), -1 without one, which is drawn gray.
      label: of the run.
    """
    many = len(class_names) > _MOST_CLASSES

    figure = new_figure(4.0 if many else 4.0 + 0.19 * math.ceil(len(class_names) / 4))
    axes = figure.subplots()
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    size = min(24, max(7, 10_000 / len(points)))
    options: dict[str, Any] = {"s": size, "alpha": 0.85, "linewidths": 0, "rasterized": True}
    axes.scatter(*points[labels < 0].T, color="#8A8F98", **options)
    if many:
        axes.scatter(*points[labels >= 0].T, c=labels[labels >= 0], cmap="viridis", **options)
    handles = []
    for number, name in () if many else enumerate(class_names):
        color = _CLASS_COLORS[number % len(_CLASS_COLORS)]
        marker = MARKERS[number // len(_CLASS_COLORS) % len(MARKERS)]
        axes.scatter(*points[labels == number].T, color=color, marker=marker, **options)
        handles.append(axes.plot([], [], marker, color=color, markersize=6, label=shorten(name, 13))[0])
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=4, handletextpad=0.1, columnspacing=1)

    coloured = (
        "colours follow the order of the classes" if many else "coloured by class" if class_names else "no labels"
    )
    alt = f"t-SNE of the features of {len(points):,} images, {coloured}"
    return Plot(f"embedding_{label}", "Features in a plane (t-SNE)", label, alt, figure, on_white=True)
