"""The interface of datasets, and the dataset that lives in arrays.

Legend: N examples asked for, H height, W width, C channels, D features.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mae_dist.data.transforms import RandomCrops, crop_images
from mae_dist.errors import ConfigError, DataFault

Read = tuple[dict[str, np.ndarray], np.ndarray]  # columns, and which rows could not be read


def digest(identity: Mapping[str, Any]) -> str:
    """Returns the hex digest of a JSON-able mapping, the same on every machine."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


class Dataset(ABC):
    """Examples by index. Picklable and cheap to pickle: reading workers are spawned processes.

    Attributes:
      num_examples: how many there are, unreadable ones already left out where they are known.
      num_classes: labels are 0 .. num_classes - 1, or -1 for an example without one; 0 if none has one.
      class_names: one name per class.
      dtype: of the images: "uint8", "uint16" or "float32" (0 to 1).
      needs_labels: true if an example without a label is a fault; set by `require_labels`.
      fingerprint: hex digest of what decides the examples and their order, not of where they are stored.
      in_memory: true if reading costs no decoding, so that threads would only get in each other's way.
      bad_records: names of the records left out when the dataset was loaded.
      max_bad_share: the largest fraction of unreadable records that batches may pass over.
      reported: numbers of unreadable records that a warning has named, so that no later evaluation names them again.
    """

    num_examples: int
    num_classes: int
    class_names: tuple[str, ...]
    fingerprint: str
    in_memory: bool
    dtype: str = "uint8"
    needs_labels: bool = False
    bad_records: tuple[str, ...] = ()
    max_bad_share: float = 0.0
    reported: frozenset[int] = frozenset()

    @abstractmethod
    def read(self, indices: np.ndarray, crops: RandomCrops | None = None, evaluation: bool = True) -> Read:
        """Reads what can be read.

        Args:
          indices: positions in the dataset, any order, repeats allowed. # (N,) int
          crops: one random crop per example; None gives the centre of the image.
          evaluation: with crops None, whether the centre is the evaluation crop (a dataset may treat both the same).

        Returns:
          {"image": (N, H, W, C) of `dtype`, "label": int32 (N,)}, or other columns of an `ArrayDataset`; and which
          rows could not be read and hold zeros. # (N,) bool

        Raises:
          DataFault: a file is gone or truncated, or a label is out of range: nothing a replacement could cure.
        """

    @property
    def total_examples(self) -> int:
        """Returns the number of examples of which `max_bad_share` is a fraction: at least those of this split."""
        return self.num_examples

    def record_name(self, index: int) -> str:
        """Names one example for a person who wants to look at it."""
        return f"example {index}"

    def file_name(self, index: int) -> str:
        """Returns the name of the file that an example came from, "" where it is not known."""
        del index
        return ""

    def fault(self, index: int) -> str:
        """Names an example that could not be read, and says why where that is known."""
        return self.record_name(index)

    def changes(self, fingerprint: str) -> str:
        """Says how the examples differ from those that had another fingerprint; "" where that is not known."""
        del fingerprint
        return ""

    def require_labels(self) -> None:
        """Makes an example without a label a fault; raises `ConfigError` where there are no two classes."""
        if self.num_classes < 2:
            found = f"one class only ({self.class_names[0]})" if self.num_classes else "no labels"
            raise ConfigError(
                f"the data has {found}, and a probe or a fine-tuning tells classes apart; for images in a folder per "
                "class set data.labels='folders', for a table data.labels='csv:FILE', or choose a data set with labels"
            )
        self.needs_labels = True

    def examples(
        self, indices: np.ndarray, crops: RandomCrops | None = None, evaluation: bool = True
    ) -> dict[str, np.ndarray]:
        """Reads examples, every one of which must be readable.

        Returns:
          {"image": (N, H, W, C), "label": int32 (N,)}

        Raises:
          DataFault: as `read`, and for a record that does not decode.
        """
        columns, bad = self.read(indices, crops, evaluation)
        if bad.any():
            names = [self.fault(int(index)) for index in np.asarray(indices)[bad]]
            raise DataFault(
                f"{len(names)} records do not decode: {', '.join(names[:10])}; restore the files they are in"
            )
        return columns


class ArrayDataset(Dataset):
    """Arrays with a common first dimension, e.g. images in memory, or features the probe trains on.

    Columns that came from .npy files are memory-mapped and pickle as their paths.
    """

    in_memory = True

    def __init__(
        self,
        columns: Mapping[str, np.ndarray],
        *,
        num_classes: int,
        class_names: tuple[str, ...] = (),
        fingerprint: str = "",
        bad_records: tuple[str, ...] = (),
        paths: Mapping[str, Path] | None = None,
    ):
        """Wraps the arrays without copying them.

        Args:
          columns: e.g. {"image": uint8 (N, H, W, C), "label": int32 (N,)} or {"features": float32 (N, D), "label": …}.
          num_classes: labels are 0 .. num_classes - 1.
          class_names: "0", "1", … if empty.
          fingerprint: computed from the arrays if empty.
          bad_records: names of records left out.
          paths: the .npy files some columns were mapped from.

        Raises:
          DataFault: the columns have different lengths or none, or a label is out of range.
        """
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1 or not all(lengths.values()):
            raise DataFault(f"columns of a dataset must have one length above 0, got {lengths}")
        self.columns = dict(columns)
        self.paths = dict(paths or {})
        self.num_examples = next(iter(lengths.values()))
        self.num_classes = num_classes
        self.class_names = class_names or tuple(str(label) for label in range(num_classes))
        self.bad_records = bad_records
        if "image" in columns:
            self.dtype = str(columns["image"].dtype)
        if "label" in columns:
            check_labels(np.asarray(columns["label"]), num_classes, self.record_name, self.needs_labels)
        self.fingerprint = fingerprint or _array_fingerprint(self.columns, num_classes)

    def read(self, indices: np.ndarray, crops: RandomCrops | None = None, evaluation: bool = True) -> Read:
        del evaluation  # what is stored is all there is
        columns = {name: column[indices] for name, column in self.columns.items()}
        if crops is not None:
            columns["image"] = crop_images(columns["image"], crops)
        return columns, np.zeros(len(indices), bool)

    def require_labels(self) -> None:
        super().require_labels()
        check_labels(np.asarray(self.columns["label"]), self.num_classes, self.record_name, self.needs_labels)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["columns"] = {name: column for name, column in self.columns.items() if name not in self.paths}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.columns = self.columns | {name: map_array(path) for name, path in self.paths.items()}


class FirstExamples(Dataset):
    """The first examples of another dataset, in its order."""

    def __init__(self, dataset: Dataset, num_examples: int):
        """Takes all of `dataset`, if it has no more than `num_examples`."""
        self._dataset = dataset
        self.num_examples = min(num_examples, dataset.num_examples)
        self.num_classes, self.class_names = dataset.num_classes, dataset.class_names
        self.fingerprint = digest({"source": "first", "of": dataset.fingerprint, "count": self.num_examples})
        self.in_memory, self.max_bad_share, self.dtype = dataset.in_memory, dataset.max_bad_share, dataset.dtype
        self.reported = dataset.reported

    @property
    def total_examples(self) -> int:
        return self._dataset.total_examples

    def record_name(self, index: int) -> str:
        return self._dataset.record_name(index)

    def file_name(self, index: int) -> str:
        return self._dataset.file_name(index)

    def fault(self, index: int) -> str:
        return self._dataset.fault(index)

    def read(self, indices: np.ndarray, crops: RandomCrops | None = None, evaluation: bool = True) -> Read:
        return self._dataset.read(indices, crops, evaluation)


def map_array(path: Path) -> np.ndarray:
    """Maps a .npy file read-only. A plain view, because indexing `np.memmap` itself is slower."""
    return np.load(path, mmap_mode="r").view(np.ndarray)


def check_labels(labels: np.ndarray, num_classes: int, record_name: Callable[[int], str], needed: bool) -> None:
    """Raises DataFault with the first label that is not a class.

    Args:
      labels: (N,) int.
      num_classes: labels must be 0 .. num_classes - 1.
      record_name: position in `labels` to the record's name.
      needed: -1, for no label, is a fault too.
    """
    wrong = np.flatnonzero((labels < (0 if needed else -1)) | (labels >= num_classes))
    if len(wrong):
        raise DataFault(
            f"{record_name(int(wrong[0]))} has label {labels[wrong[0]]}, but the classes are 0 .. {num_classes - 1} "
            f"({len(wrong)} such labels here); use a split that has labels, or repair the dataset"
        )


def _array_fingerprint(columns: Mapping[str, np.ndarray], num_classes: int) -> str:
    content = {
        name: [str(column.dtype), column.shape, hashlib.sha256(np.ascontiguousarray(column).data).hexdigest()]
        for name, column in columns.items()
    }
    return digest({"source": "arrays", "columns": content, "num_classes": num_classes})
