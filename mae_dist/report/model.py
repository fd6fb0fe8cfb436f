"""Predictions and features of test images by a run's newest good checkpoint, nothing masked.

Shapes: N images, H W C image, D width, Y classes.
"""

import contextlib
import dataclasses
import json

import numpy as np

from mae_dist.data import Dataset
from mae_dist.data.from_config import open_dataset
from mae_dist.errors import DataFault
from mae_dist.evaluation import evaluate, extract, predictions
from mae_dist.evaluation.encoder import Encoder
from mae_dist.evaluation.patch_colours import patch_colours
from mae_dist.evaluation.pictures import as_shown, fractions
from mae_dist.report.runs import Run
from mae_dist.task_kinds import kind_of
from mae_dist.weights import pretrained

_BATCH_SIZE = 256
_NUM_SHOWN = 24  # images that the page shows with their predictions
_NUM_COLOURED = 12  # images whose patches it shows in colours
_NUM_EMBEDDED = 2000


@dataclasses.dataclass(frozen=True)
class Seen:
    """Predictions and features of the first readable images of a split.

    origin: of the weights. split: its name and how many images of how many, in words.
    images: the very first as a person can see them, float32 (n, H, W, 1 or 3) in 0..1. features: float32 (N, D).
    labels: int (N,), -1 without one. predictions: int (N,), None for an encoder without a head. patches: of the very
    first, by the colours of their features, float32 (m, H, W, 3) in 0..1.
    """

    origin: str
    split: str
    class_names: tuple[str, ...]
    images: np.ndarray
    features: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray | None
    patches: np.ndarray


class Viewer:
    """Computes what the models of runs make of test images; splits that several runs share are opened once.

    Args:
      data_dir: where TFDS keeps data sets, if not where a run had it.
      max_images: the most of a split that a model sees.
    """

    def __init__(self, data_dir: str, max_images: int):
        self._data_dir, self._max_images = data_dir, max_images
        self._splits: dict[str, Dataset] = {}

    def look(self, run: Run) -> Seen:
        """Returns the predictions and features of this run's model.

        Raises:
          UserError: there is no good checkpoint, there are no data, or either cannot be read.
        """
        source = pretrained.open_pretrained(run.workdir)
        config = source.config
        name = extract.last_split(config)
        with config.unlocked():
            config.data.data_dir = self._data_dir or config.data.data_dir
            config.mesh.update(data=-1, fsdp=1, tensor=1)
            config.eval.batch_size = _BATCH_SIZE
        split = config.data[f"{name}_split"]
        key = json.dumps([config.data.to_dict(), config.model.image_size, config.model.channels, split])
        if key not in self._splits:
            self._splits[key] = open_dataset(config, split)
        dataset = self._splits[key]
        is_encoder = kind_of(config).has_decoder
        compute = extract.prepare(source, config, ("mean",)) if is_encoder else predictions.prepare(source, config)
        with contextlib.closing(compute(dataset)) as batches:
            columns = evaluate.first_rows(batches, self._max_images)
        count = len(columns["label"])
        images = dataset.examples(columns["index"][:_NUM_SHOWN])["image"]
        patches = Encoder(source).features(images[:_NUM_COLOURED], "patches")
        some = "all" if count == dataset.num_examples else f"the first {count:,} of the"
        return Seen(
            origin=source.origin,
            split=f"{some} {dataset.num_examples:,} {name} images",
            class_names=tuple(dataset.class_names),
            images=as_shown({"original": fractions(images, config)}, config)["original"],
            features=columns["mean"],
            labels=columns["label"],
            predictions=columns["logits"].argmax(axis=1) if "logits" in columns else None,
            patches=patch_colours(patches, config.model.patch_size),
        )


def embed(seen: Seen, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns (points (n, 2), labels (n,)): t-SNE on at most 50 principal components, of at most 2,000 images, seeded.

    Raises:
      DataFault: the features have no distances, and scikit-learn's t-SNE would fail or crash.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(len(seen.labels))[:_NUM_EMBEDDED])
    features = seen.features[chosen]
    if len(features) <= 3:
        raise DataFault(f"there are {len(features)} images only; give it a split of more than 3")
    if not np.isfinite(features).all():
        raise DataFault("some are not finite; the run has diverged, continue it from an earlier checkpoint")
    if (features == features[0]).all():
        raise DataFault("those of all images are equal; the encoder has collapsed, or has not learned anything yet")
    components = min(50, *features.shape)
    reduced = PCA(components, random_state=seed).fit_transform(features)
    perplexity = min(30.0, (len(reduced) - 1) / 3)
    tsne = TSNE(2, perplexity=perplexity, init="pca" if components > 1 else "random", random_state=seed)
    with threadpool_limits(1, "openmp"):  # its threads synchronize often, and spin if other processes are busy
        return tsne.fit_transform(reduced), seen.labels[chosen]
