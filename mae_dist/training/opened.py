"""Read access to a run, finished or not: `mae_dist.open_run(workdir)`.

Here and not in `evaluation`, because an evaluation or a picture as the run itself has them comes from the run's `Job`.

Shapes: B images, H W C image.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from numpy.typing import ArrayLike

from mae_dist import errors, names, storage
from mae_dist.checkpoint import reader
from mae_dist.cpu.start import use_cores
from mae_dist.data import ArrayDataset
from mae_dist.data.from_config import Data, open_dataset
from mae_dist.data.sources.folder import FolderDataset
from mae_dist.evaluation import evaluate, extract, pictures, predictions
from mae_dist.evaluation.encoder import Encoder, load_encoder
from mae_dist.evaluation.own_images import Paths, are_paths, missing, open_given
from mae_dist.metrics.recorder import read_metrics
from mae_dist.metrics.summary import read_summary
from mae_dist.model.build import Params
from mae_dist.task_kinds import kind_of
from mae_dist.training import job
from mae_dist.training.run import with_features
from mae_dist.weights import hub, pretrained

SPLITS = ("train", "val", "test")


def open_run(workdir: str | os.PathLike[str]) -> "Run":
    """Opens the run in `workdir`, finished or not; nothing there is changed.

    `hf://OWNER/NAME` is the copy of a workdir on the Hugging Face hub, which is downloaded with all its checkpoints.

    Raises:
      StorageFault: there is no run, or its config cannot be read.
      UserError: as `mae_dist.weights.hub.download`.
    """
    given = os.fsdecode(workdir)
    if given.startswith(names.HUB):
        downloaded = hub.download(given)
        if not downloaded.is_run:
            raise errors.StorageFault(f"{given} is no run of mae_dist; read its weights by mae_dist.load_encoder")
        path = downloaded.path
    else:
        path = storage.absolute(given)
    return Run(path, reader.read_config(path))


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A run in its directory. Everything is read when it is asked for, because a run may still be training.

    Attributes:
      workdir: where it is.
      config: what it trains, locked.
    """

    workdir: epath.Path
    config: ConfigDict = dataclasses.field(repr=False)

    @property
    def steps(self) -> list[int]:
        """Returns the steps of the saved checkpoints, ascending."""
        return reader.steps(self.workdir)

    @property
    def step(self) -> int:
        """Returns the step of the newest checkpoint, 0 before the first."""
        return max(self.steps, default=0)

    def metrics(self) -> list[dict[str, float]]:
        """Returns the records of metrics.jsonl, each with its `step`; values that are not finite are NaN.

        Raises:
          StorageFault: the file cannot be read.
        """
        return read_metrics(self.workdir)

    def summary(self) -> dict[str, Any]:
        """Returns summary.json: the result of a finished run; {} before.

        Raises:
          StorageFault: the file cannot be read.
        """
        return read_summary(self.workdir)

    def load_params(self, step: int | None = None) -> Params:
        """Returns the parameters: nested dicts of NumPy arrays, by group (`encoder`, `decoder`, `head`).

        Of a run with `ema_decay` they are the moving averages, which are what is evaluated.

        Args:
          step: one of `steps`; None for the newest checkpoint that is good.

        Raises:
          StorageFault: there is no such checkpoint, or it is not as it was saved.
        """
        return pretrained.open_workdir(self.workdir, step).load_whole()

    def reconstruct(self, images: ArrayLike | Paths) -> dict[str, np.ndarray]:
        """Removes patches of images and restores them, as the command `reconstruct` does.

        All images are computed at once. The mask of an image depends on its place among them and the run's seed alone.

        Args:
          images: (B, H, W, C), any B above 0: of the type that the model was trained on, as uint8 in 0..255, or
            floating-point in 0..1, of the model's size. Or a list of paths of image files, of any size.

        Returns:
          `original`, `masked`, `reconstruction` and `with_visible` (the reconstruction with the patches that were
          visible), each float32 (B, H, W, C) in 0..1.

        Raises:
          ConfigError: the run is no pretraining, so that it has no decoder.
          DataFault: images of another shape, type or range, or files that do not decode; it names them.
          StorageFault: there is no good checkpoint.
        """
        if not kind_of(self.config).has_decoder:
            raise errors.ConfigError(
                f"{self.workdir} is a {self.config.task}: it has no decoder; open the workdir of its pretraining"
            )
        dataset = open_given(images, self.config)
        if are_paths(images):
            columns = dataset.examples(np.arange(dataset.num_examples))  # raises for a file that does not decode
            dataset = ArrayDataset(columns, num_classes=0)
        params = self._load()
        return pictures.reconstruct(
            self._job.reconstruct_step,
            params,
            dataset,
            self._job.batch_sharding,
            dataset.num_examples,
            self.config.seed,
        )[0]

    def predict(self, images: ArrayLike | Paths) -> np.ndarray:
        """Classifies images by the newest checkpoint of a probe or a fine-tuning.

        Compiles the model for a power of two of images, up to the batch size of the run's evaluations; later calls for
        about as many reuse it.

        Args:
          images: as for `reconstruct`; of files, a batch is in memory at a time.

        Returns:
          The probability of each of `class_names`, float32 (B, Y).

        Raises:
          ConfigError: the run is a pretraining, which has no classes.
          DataFault: as `reconstruct`.
          StorageFault: there is no good checkpoint.
        """
        dataset = open_given(images, self.config)
        largest = self.config.eval.batch_size or self.config.global_batch_size
        size = min(largest, 1 << max(0, dataset.num_examples - 1).bit_length())
        batches = list(self._classifiers(pretrained.open_workdir(self.workdir).step)(size)(dataset))
        if bad := missing(dataset, np.concatenate([batch["index"] for batch in batches]).tolist()):
            names = ", ".join(map(dataset.fault, bad[:10]))
            raise errors.DataFault(f"{len(bad)} of {dataset.num_examples} files do not decode: {names}")
        return predictions.probabilities(np.concatenate([batch["logits"] for batch in batches]))

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        """Returns the names of a classifier's classes, () of a pretraining; numbers where its data are gone."""
        source = pretrained.open_workdir(self.workdir)
        return predictions.class_names(source) if source.num_classes else ()

    def evaluate(self, split: str = "val") -> dict[str, float]:
        """Evaluates the newest checkpoint on a whole split, as the run itself does.

        Args:
          split: "train", "val" or "test", as `config.data` has them.

        Returns:
          The metrics, as `val_loss`, and of a classifier `val_top1` and more: behind each name's prefix as recorded.

        Raises:
          ConfigError: the run has no such split.
          DataFault: its data is missing or cannot be read.
          StorageFault: there is no good checkpoint.
        """
        dataset = open_dataset(self.config, self._expression(split))
        built, params = self._job, self._load()
        with jax.set_mesh(built.mesh):
            if built.caches_features:
                dataset = with_features(built, params, dataset)
            batches = evaluate.global_batches(dataset, built.batch_sharding, built.eval_batch_size, built.config.seed)
            return evaluate.evaluate(built.eval_step, params, batches, f"{split}_", dataset.class_names)

    def files(self, split: str = "val") -> list[str]:
        """Returns the paths of the images of a split, in its order; those that do not decode are among them.

        Args:
          split: "train", "val" or "test", as `config.data` has them.

        Raises:
          ConfigError: the run has no such split, or its data are not image files in directories.
          DataFault: the directory is gone or empty.
        """
        config = self.config.copy_and_resolve_references().unlock()
        config.data.cache = "stream"  # nothing is decoded for the names
        dataset = open_dataset(config, self._expression(split))
        if not isinstance(dataset, FolderDataset):
            raise errors.ConfigError(
                f"the images of data.source={config.data.source!r} are no files of their own; open a run of 'folder'"
            )
        return [os.fsdecode(os.path.join(dataset.root, name)) for name in dataset.names]

    def encoder(self) -> Encoder:
        """Returns the trained encoder, as `mae_dist.load_encoder`."""
        return load_encoder(self.workdir)

    def _expression(self, split: str) -> str:
        """Returns the expression of a split by its name."""
        if split not in SPLITS:
            raise errors.ConfigError(f"there is no split {split!r}; choose of {', '.join(SPLITS)}")
        expression = self.config.data[f"{split}_split"]
        if not expression:
            raise errors.ConfigError(f"the run has no such split: data.{split}_split is ''")
        return expression

    @functools.cached_property
    def _classifiers(self) -> Callable[[int], Callable[[int], extract.Compute]]:
        """Returns a function: step -> batch size -> classifier. It keeps weights and classifiers of one step."""

        @functools.lru_cache(maxsize=1)
        def of_step(step: int) -> Callable[[int], extract.Compute]:
            source = pretrained.open_workdir(self.workdir, step)
            kept: list[Params] = []

            def load(shardings: Params) -> Params:
                if not kept:
                    kept.append(source.load(shardings))
                return kept[0]

            def compile_for(size: int) -> extract.Compute:
                config = source.config.copy_and_resolve_references()
                found = dataclasses.replace(source, config=config, load=load)
                return predictions.prepare(found, extract.with_devices(found, None, size))

            return functools.cache(compile_for)

        return of_step

    def _load(self) -> Params:
        """Returns the parameters of the newest good checkpoint, sharded for the evaluations of the run's job."""
        return reader.load_params(self.workdir, self._job.abstract_state.params, self._job.eval_shardings)[1]

    @functools.cached_property
    def _job(self) -> job.Job:
        """Builds the run's computations for the devices of this process, without its data."""
        config = self.config.copy_and_resolve_references()
        use_cores(config, str(self.workdir))  # as the run did, to the same last bits
        num_classes = max(1, pretrained.open_workdir(self.workdir).num_classes)
        no_images = ArrayDataset({"label": np.zeros(1, np.int32)}, num_classes=num_classes)
        return job.build(_fitting(config), jax.devices(), Data(no_images, None, None))


def _fitting(config: ConfigDict) -> ConfigDict:
    """Returns a run's config for an evaluation on the devices that are here: as it is if these suit its mesh.

    Else each device has a whole model, and batches are rounded up to what divides among the devices.
    """
    count = jax.device_count()
    try:
        job.check_mesh(config, count)
        return config
    except errors.ConfigError:
        config = config.copy_and_resolve_references().unlock()
        config.mesh.update(data=-1, fsdp=1, tensor=1)
        config.accum_steps = config.cpu.pieces = 1
        size = config.eval.batch_size or config.global_batch_size
        config.global_batch_size = config.eval.batch_size = math.ceil(size / count) * count
        return config.lock()
