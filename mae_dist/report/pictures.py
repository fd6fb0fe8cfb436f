"""A report's pictures of models: what they restored, predicted and confused, accuracy by class, features in a plane."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from mae_dist.evaluation.evaluate import NUM_LOWEST
from mae_dist.metrics.summary import last_values
from mae_dist.report.groups import Group, mean_std
from mae_dist.report.model import Seen
from mae_dist.report.plot import MARKERS, Line, Plot, shorten
from mae_dist.storage import storage_errors

RIGHT, WRONG = "#0072B2", "#D55E00"
_MOST_CLASSES = 30  # that names, cells or colours can still be told apart of
# Ten that differ for colour-blind people too (Tol's muted, and one gray); markers tell the rest.
_CLASS_COLORS = (
    "#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499", "#8A8F98",
)  # fmt: skip
_PICTURE_WIDTH = 1000  # pixels in the page


def some_pictures(workdir: epath.Path, most: int = 4) -> list[epath.Path]:
    """The pictures that training drew: the first, some between, the last."""
    directory = workdir / "pictures"
    with storage_errors(directory):
        found = directory.iterdir() if directory.is_dir() else ()
        paths = sorted(path for path in found if path.name.startswith("step_") and path.suffix == ".png")
    if len(paths) <= most:
        return paths
    return [paths[round(i * (len(paths) - 1) / (most - 1))] for i in range(most)]


def to_data_uri(path: epath.Path) -> str:
    """A picture of a run, no larger than a page needs it, as a data URI.

    Raises:
      OSError: it cannot be read, or is no picture.
    """
    with Image.open(io.BytesIO(path.read_bytes())) as picture:
        image = picture.convert("RGB")
    if image.width > _PICTURE_WIDTH:
        height = round(image.height * _PICTURE_WIDTH / image.width)
        image = image.resize((_PICTURE_WIDTH, height), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.quantize(256).save(data, "PNG", optimize=True)  # a third of the bytes
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def _shown(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, C) -> (H, W, 3), without any alpha."""
    return np.broadcast_to(image[..., :3], (*image.shape[:2], 3))


def predictions(seen: Seen, name: str) -> Plot:
    """The first images of the split with what they were taken for."""
    assert seen.predictions is not None
    found = list(zip(seen.images, seen.labels, seen.predictions, strict=False))  # of all, the first have images
    right = sum(int(label == predicted) for _, label, predicted in found)
    columns = 6
    rows = math.ceil(len(found) / columns)

    def draw(figure: Figure) -> None:
        for place, axes in enumerate(np.asarray(figure.subplots(rows, columns, squeeze=False)).flat):
            axes.set(xticks=[], yticks=[])
            axes.grid(visible=False)
            if place >= len(found):
                axes.set_axis_off()
                continue
            image, label, predicted = found[place]
            axes.imshow(_shown(image), interpolation="nearest")
            good = label == predicted
            for spine in axes.spines.values():
                spine.set(visible=True, color=RIGHT if good else WRONG, linewidth=2.2)
            truth, guess = (shorten(seen.class_names[i], 11) for i in (label, predicted))
            axes.set_title(f"✓ {truth}" if good else f"✗ {guess}", fontsize=7.5, pad=3)
            axes.set_xlabel("" if good else f"is {truth}", fontsize=7.5, labelpad=2)

    return Plot(
        f"predictions_{name}",
        "The first images and their predictions",
        name,
        f"{right} of the first {len(found)} images are predicted right",
        draw,
        height=0.2 + 0.95 * rows,
    )


def confusion(seen: Seen, name: str) -> Plot:
    """Shares of each true class that were taken for each class, in percent."""
    counts = seen.confusion
    size = len(counts)
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    wrong = counts - np.diag(np.diag(counts))
    worst = [np.unravel_index(place, wrong.shape) for place in np.argsort(-wrong, axis=None)[:3]]
    told = ", ".join(
        f"{seen.class_names[i]} for {seen.class_names[j]} {wrong[i, j]} times" for i, j in worst if wrong[i, j]
    )

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.grid(visible=False)
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
        axes.set(xlabel="predicted class", ylabel="true class")
        axes.spines[:].set_visible(False)
        if size <= _MOST_CLASSES:
            names = [shorten(name, 12) for name in seen.class_names]
            axes.set_xticks(range(size), names, rotation=90 if max(map(len, names)) > 2 else 0)
            axes.set_yticks(range(size), names)
            axes.tick_params(length=0)
        else:
            figure.colorbar(image, ax=axes, label="% of the true class", shrink=0.8)
        if size <= 12:
            for i, j in np.ndindex(size, size):
                if counts[i, j]:
                    color = "white" if shares[i, j] > 55 else "#1A1A1A"
                    axes.text(j, i, f"{shares[i, j]:.0f}", ha="center", va="center", fontsize=7.5, color=color)
        axes.add_patch(Rectangle((-0.5, -0.5), size, size, fill=False, edgecolor="#8A8F98", linewidth=0.8))

    return Plot(
        f"confusion_{name}",
        "Confusion matrix, % of each true class",
        name,
        f"Accuracy {100 * np.trace(counts) / max(1, counts.sum()):.2f} %. Most often confused: {told or 'none'}",
        draw,
        height=4.1,
    )


def per_class(groups: Sequence[Group], styles: Mapping[str, Line]) -> Plot | None:
    """Accuracy of each class by the last evaluation, means over seeds: of the test split where it was evaluated.

    Of many classes each run has recorded its own lowest, so a mean is over the runs that name the class.
    """
    found: dict[str, dict[str, float]] = {}
    split = "test" if any(one.values("test_top1") for one in groups) else "val"
    prefix = f"{split}_top1/"
    few = False
    for one in groups:
        values: dict[str, list[float]] = {}
        for last in (last_values(run.records) for run in one.runs):
            few |= f"{split}_top1_min" in last
            for name, value in last.items():
                if name.startswith(prefix) and math.isfinite(value):
                    values.setdefault(name.removeprefix(prefix), []).append(100 * value)
        if values:
            found[one.label] = {label: mean_std(several)[0] for label, several in values.items()}
    if not found:
        return None
    classes = list(dict.fromkeys(label for accuracies in found.values() for label in accuracies))
    first = next(iter(found.values()))
    title = (
        f"The {NUM_LOWEST} least accurate classes of each run ({split})" if few else f"Accuracy of each class ({split})"
    )
    if len(classes) > _MOST_CLASSES:
        lowest = {label: min(one.get(label, math.inf) for one in found.values()) for label in classes}
        classes = sorted(classes, key=lambda label: lowest[label])[:_MOST_CLASSES]
        title += f", the lowest {_MOST_CLASSES} of them"

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, (label, accuracies) in enumerate(found.items()):
            rows = [row for row, name in enumerate(classes) if name in accuracies]
            axes.plot(
                [accuracies[classes[row]] for row in rows],
                rows,
                linestyle="none",
                marker=MARKERS[number % len(MARKERS)],
                color=styles[label][1],
                markersize=5.5,
                alpha=0.9,
            )
        axes.set_yticks(range(len(classes)), [shorten(name, 18) for name in classes])
        axes.invert_yaxis()
        axes.set_xlabel("%")
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.05)

    worst = min(first, key=lambda label: first[label])
    told = f"{title}. Of {next(iter(found))} the least accurate is {worst} with {first[worst]:.1f} %"
    legend = tuple((label, styles[label][1], "-") for label in found)
    return Plot("per_class", title, "", told, draw, height=0.9 + 0.23 * len(classes), legend=legend)


def embedding(points: np.ndarray, labels: np.ndarray, class_names: Sequence[str], name: str) -> Plot:
    """Features in a plane, coloured by class; with too many classes for a legend, by their order."""
    many = len(class_names) > _MOST_CLASSES

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        options: dict[str, Any] = {
            "s": min(24, max(7, 10_000 / len(points))),
            "alpha": 0.85,
            "linewidths": 0,
            "rasterized": True,
        }
        if many:
            axes.scatter(*points.T, c=labels, cmap="viridis", **options)
            return
        handles = []
        for label, text in enumerate(class_names):
            chosen = points[labels == label]
            color = _CLASS_COLORS[label % len(_CLASS_COLORS)]
            marker = MARKERS[label // len(_CLASS_COLORS) % len(MARKERS)]
            axes.scatter(*chosen.T, color=color, marker=marker, **options)
            handles.append(axes.plot([], [], marker, color=color, markersize=6, label=shorten(text, 13))[0])
        figure.legend(handles=handles, loc="outside lower center", ncols=4, handletextpad=0.1, columnspacing=1)

    colours = "colours follow the order of the classes" if many else "coloured by class"
    return Plot(
        f"embedding_{name}",
        "Features in a plane (t-SNE)",
        name,
        f"t-SNE of the features of {len(points):,} images, {colours}",
        draw,
        on_white=True,
        height=4.0 if many else 4.0 + 0.19 * math.ceil(len(class_names) / 4),
    )
