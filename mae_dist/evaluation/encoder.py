"""Trained encoders as functions of images: `mae_dist.load_encoder(path).features(images)`.

Shapes: B images, H W C image, (gh, gw) grid of patches, N tokens, D width.
"""

import functools
import operator
import os
from collections.abc import Callable
from typing import SupportsIndex

import jax
import numpy as np
from ml_collections import ConfigDict
from numpy.typing import ArrayLike

from mae_dist.errors import ConfigError
from mae_dist.evaluation.encode import check_kind, make_feature_step, needed_shapes
from mae_dist.evaluation.own_images import Paths, are_paths, check_images, open_given
from mae_dist.model import patches
from mae_dist.parallel.mesh import make_mesh
from mae_dist.parallel.shardings import replicated
from mae_dist.weights import pretrained


def _whole(name: str, value: SupportsIndex) -> int:
    """Returns a whole number of any integer type as an int; raises a `ConfigError` for anything else, 1.0 included."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise ConfigError(f"{name}={value!r} is no whole number; give an int") from error


class Encoder:
    """A trained encoder on this process's first device.

    Attributes:
      image_size: (height, width) of the images it takes.
      channels: C.
      grid: (gh, gw) patches down and across.
      embed_dim: D.
      depth: number of blocks.
      config: everything known of how it was trained.
    """

    def __init__(self, source: pretrained.Pretrained):
        self.config = config = source.config
        model = config.model
        self.image_size, self.channels = tuple(model.image_size), model.channels
        self.grid = patches.grid_size(model.image_size, model.patch_size)
        self.embed_dim, self.depth = model.embed_dim, model.depth
        self._origin = source.origin
        self._params = source.load_here(needed_shapes(source))
        mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.local_devices()[:1])
        make_step = functools.partial(make_feature_step, config, mesh, replicated(mesh))
        self._make_step = functools.cache(make_step)  # compiles once for each size, kind and block

    def __repr__(self) -> str:
        height, width = self.image_size
        return f"Encoder({self._origin}: {height}x{width}x{self.channels} -> {self.embed_dim}, {self.depth} blocks)"

    def features(
        self, images: ArrayLike | Paths, kind: str = "mean", *, block: int | None = None, batch_size: int = 256
    ) -> np.ndarray:
        """Computes deterministic features of whole images, nothing masked.

        Args:
          images: (B, H, W, C), any B: uint8 in 0..255, or floating-point in 0..1; or uint16, for a model that was
            trained on such. H, W and C are `image_size` and `channels`; mean and standard deviation of the training
            are applied here. Or a list of paths of image files, as from `mae_dist.find_images`, of any size and format
            that `data.source="folder"` reads; a batch of them is in memory at a time.
          kind: `mean` over the patches, `cls` for the class token (of several the mean), `patches` for one vector per
            patch.
          block: of which block's output, from 1, before any norm; 0 is what enters the first; None is the output of the
            last one, normalised.
          batch_size: images computed at once.

        Returns:
          float32, (B, D) or for `patches` (B, gh, gw, D), on the host.

        Raises:
          ConfigError: a kind or block that the model does not have, a batch size that is no whole number above 0, or
            one path instead of a list.
          DataFault: images of another shape, type or range, or files that do not decode; it names them.
        """
        # Before they name a compiled step: 1.0 and 1 are the same key there.
        batch_size, block = _whole("batch_size", batch_size), block if block is None else _whole("block", block)
        if batch_size < 1:
            raise ConfigError(f"batch_size {batch_size}: at least one image has to be computed at once")
        check_kind(kind)
        read, count = self._reader(images)
        # Few different sizes, for each is compiled: powers of two up to the batch's.
        size = min(batch_size, 1 << max(0, count - 1).bit_length())
        step = self._make_step(size, (kind,), block)
        width = (*self.grid, self.embed_dim) if kind == "patches" else (self.embed_dim,)
        result = np.empty((count, *width), np.float32)
        for start in range(0, count, size):
            stop = min(start + size, count)
            part = read(np.arange(start, stop))
            padded = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), part.dtype)])
            result[start:stop] = np.asarray(step(self._params, {"image": padded})[kind])[: len(part)]
        return result

    def _reader(self, images: ArrayLike | Paths) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
        """Returns a function from numbers of images to these, and how many there are."""
        if are_paths(images):
            dataset = open_given(images, self.config)
            return lambda rows: dataset.examples(rows)["image"], dataset.num_examples
        array = check_images(np.asarray(images), (*self.image_size, self.channels), self.config.data.dtype)
        return array.__getitem__, len(array)


def load_encoder(path: str | os.PathLike[str], config: ConfigDict | None = None) -> Encoder:
    """Loads a trained encoder.

    Args:
      path: the workdir of a run (its newest checkpoint), a directory written by `mae_dist.convert`, one in Hugging
        Face's layout (ViTMAE or ViT), or a `.pth` or `.safetensors` file in timm's; or `hf://OWNER/NAME[@REVISION]`
        for such a directory on the Hugging Face hub, with a path in it for a subdirectory or a file.
      config: for timm's layout, whose files do not say the number of heads nor the scaling of pixels: a config with
        both. Without it, those of the published models are assumed, and logged.

    Raises:
      DataFault, StorageFault, ConfigError: as `mae_dist.weights.pretrained.open_source`.
    """
    return Encoder(pretrained.open_source(path, config))
