"""Datasets of encoded image files, decoded and resized when they are read.

Legend: N examples asked for, H height, W width, C channels.
"""

import contextlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mae_dist.data.dataset import Dataset, Read, check_labels, digest
from mae_dist.data.decode import PHOTOGRAPH_FROM, Decoder
from mae_dist.data.image_files import Header, UndecodableImage
from mae_dist.data.resample import Box
from mae_dist.data.transforms import RandomCrops, center_box

_AT_ONCE = 32  # files held at a time: those of a whole batch are as large as the batch
_EVALUATION_ZOOM = 256 / 224  # resize the short side to 256, crop 224: ImageNet's usual evaluation
# Parts of the fingerprint: raise one when decoding changes what an example shows, and runs must not go on over that. A
# better resampling, a few grey levels here and there, is not that.
_DECODE_RULES = 1  # of small images, which have nothing to spare at the border either
_DECODE_RULES_PHOTOGRAPHS = 2  # of those that are resized to PHOTOGRAPH_FROM pixels or more


class EncodedDataset(Dataset):
    """Decodes images when they are read; a subclass says where their files are.

    Attributes:
      title: names the split for people.
      identity: decides the examples and their order; the fingerprint is its digest.
      image_size: (height, width) of the images given out.
      decoder: what files are decoded to.
      native_size: (height, width) if all images have one size.
      crops_evaluation: true if evaluation sees the middle of an image where training without random crops sees all.
    """

    in_memory = False

    def __init__(
        self,
        *,
        title: str,
        identity: Mapping[str, Any],
        num_examples: int,
        image_size: tuple[int, int],
        decoder: Decoder,
        native_size: tuple[int, int] | None,
        class_names: Sequence[str],
    ):
        """Describes the images; `identity` is what tells this split from any other, whatever it is decoded to."""
        self.title = title
        self.num_examples = num_examples
        self.image_size, self.decoder, self.native_size = image_size, decoder, native_size
        self.dtype = decoder.dtype
        self.num_classes, self.class_names = len(class_names), tuple(class_names)
        self.crops_evaluation = min(image_size) >= PHOTOGRAPH_FROM and native_size != image_size
        self.identity = {
            **identity,
            "count": num_examples,
            "image_size": image_size,
            "channels": decoder.channels,
            "decode_rules": _DECODE_RULES_PHOTOGRAPHS if self.crops_evaluation else _DECODE_RULES,
        }
        if changed := {name: value for name, value in vars(decoder).items() if value != getattr(Decoder(1), name)}:
            self.identity["decoder"] = changed | {"channels": decoder.channels}
        self.fingerprint = digest(self.identity)

    @abstractmethod
    def encoded(self, indices: np.ndarray) -> tuple[list[bytes | None], np.ndarray]:
        """Reads the images' files, None where there is no image, and labels. # (n,) -> n, int32 (n,)"""

    @property
    @abstractmethod
    def stats(self) -> list[Any]:
        """Returns JSON-able values that change when a file on disk does; a decoded copy is then made again."""

    def read(self, indices: np.ndarray, crops: RandomCrops | None = None, evaluation: bool = True) -> Read:
        indices = np.asarray(indices)
        images = np.zeros((len(indices), *self.image_size, self.decoder.channels), self.dtype)
        labels = np.zeros(len(indices), np.int32)
        bad = np.ones(len(indices), bool)
        for start in range(0, len(indices), _AT_ONCE):
            rows = np.arange(start, min(start + _AT_ONCE, len(indices)))
            files, labels[rows] = self.encoded(indices[rows])
            check_labels(
                labels[rows],
                self.num_classes,
                lambda row, at=start: self.record_name(int(indices[at + row])),
                self.needs_labels,
            )
            headers = [self.decoder.header(data) if data else Header(0, 0) for data in files]
            sizes = np.array([header[:2] for header in headers], np.int64)  # (n, 2)
            if crops is None:
                boxes = [self._center_box(h or 1, w or 1, evaluation) for h, w in sizes.tolist()]
            else:
                boxes = crops.take(rows).boxes(*np.maximum(sizes, 1).T).tolist()
            for row, data, header, box in zip(rows, files, headers, boxes, strict=True):
                if data and header.height and header.width:
                    with contextlib.suppress(UndecodableImage):  # one at a time, into its place
                        self.decoder.decode_box(data, header, box, images[row], margin=crops is None)
                        bad[row] = False
        return {"image": images, "label": labels}, bad

    def _center_box(self, height: int, width: int, evaluation: bool) -> Box:
        """Returns the box that is seen without a random crop; all of an image that has the model's size."""
        crops = evaluation and self.crops_evaluation and (height, width) != self.image_size
        return center_box(height, width, self.image_size, _EVALUATION_ZOOM if crops else 1.0)

    def fault(self, index: int) -> str:
        """Names a record that does not decode, and says why."""
        data = self.encoded(np.array([index]))[0][0]
        if not data:
            return f"{self.record_name(index)} (it is empty or gone)"
        try:
            self.decoder.decode(data)
        except UndecodableImage as error:
            return f"{self.record_name(index)} ({error})"
        return self.record_name(index)
