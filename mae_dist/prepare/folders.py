"""Finds the images of directories of any layout, with their splits and labels.

Legend: N images.
"""

import dataclasses
import hashlib
import logging

import numpy as np

from mae_dist import names
from mae_dist.data.sources.folder import directory_splits, tabulate
from mae_dist.data.sources.listed import SPLITS
from mae_dist.data.sources.listing import Listing, find_images
from mae_dist.errors import DataFault, UserError

_NAMES = {"train": "train", "val": "validation", "test": "test"}  # of splits here and in TFDS
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Folder:
    """The image files below a directory.

    Attributes:
      root: the directory.
      listing: all image files.
      rows: of the listing, by the splits' names in TFDS, in their order.
      depth: 1 if names begin with the directory of their split.
      numbers: labels by row, -1 without one.
      class_names: of the labels; () without labels.
      labels: "none", "folders" or "csv:FILE".
      has_default_labels: false if they are to be told apart from what was found without asking for any.
    """

    root: str
    listing: Listing
    rows: dict[str, list[int]]
    depth: int
    numbers: np.ndarray
    class_names: tuple[str, ...]
    labels: str
    has_default_labels: bool

    def name(self, row: int) -> bytes:
        """Returns the name of a file in the directory of its split."""
        name = self.listing.names[row]
        return name.partition(b"/")[2] if self.depth else name

    def contents(self) -> str:
        """Describes the files, by which a change of them is found: number and digest of names and sizes by split."""
        parts = []
        for split, rows in self.rows.items():
            lines = b"\n".join(b"%s %d" % (self.name(row), self.listing.sizes[row]) for row in rows)
            parts.append(f"{split} {len(rows)} files, digest {hashlib.sha256(lines).hexdigest()[:16]}")
        if not self.has_default_labels:
            digest = hashlib.sha256(repr(self.class_names).encode() + self.numbers.tobytes()).hexdigest()
            parts.append(f"labels {self.labels}, digest {digest[:16]}")
        return "; ".join(parts)


def find_folder(root: str, labels: str | None, val_fraction: float) -> Folder:
    """Finds the images below a directory, whatever its layout, with their splits and labels.

    Args:
      root: as `find_images` takes it.
      labels: as for the source "folder"; None: "folders" if most images of train/ are in directories there, else
        "none".
      val_fraction: of the images of train/ that become the split validation, if there is none.

    Raises:
      ConfigError, DataFault: as `find_images` and `open_folder`.
    """
    try:
        listing = find_images(root)
        in_classes = labels is None and _has_classes(listing)
        has_splits = True if in_classes else None
        chosen = labels or ("folders" if in_classes else "none")
        table = tabulate(listing, chosen, val_fraction, has_splits=has_splits)
    except UserError as error:  # in the words of these flags
        message = str(error).replace("data.data_dir", "--from_folder").replace("data.labels", "--labels")
        raise type(error)(message) from error
    if labels is None:
        others = "--labels=none: without" if in_classes else "--labels=folders: directories; --labels=csv:FILE: a table"
        what = f"{chosen}, the directories in train/" if in_classes else chosen
        _LOG.info("labels: %s (%s)", what, others)
    if str(listing.left_out):
        _LOG.warning("%s: %s", root, listing.left_out)
    rows = {
        _NAMES[name]: sorted(of_split.tolist(), key=lambda row: listing.names[row].split(b"/"))
        for name, of_split in table.rows.items()
        if name in _NAMES and len(of_split)
    }
    if "train" not in rows:
        raise DataFault(f"{root} has no image for training, only of {', '.join(rows)}")
    if faults := [fault for name in table.class_names if (fault := names.label_fault(name))]:
        raise DataFault(f"{root}: the class {'; '.join(faults[:10])}")
    return Folder(
        root,
        listing,
        rows,
        directory_splits(listing, has_splits)[1],
        table.labels,
        table.class_names,
        chosen,
        has_default_labels=in_classes or (labels == "folders" and _has_classes(listing)),
    )


def _has_classes(listing: Listing) -> bool:
    """True if most images of train/ are in directories there."""
    depths = [name.count(b"/") for name in listing.names if SPLITS.get(name.partition(b"/")[0].lower()) == "train"]
    depths = [depth for depth in depths if depth]
    return sum(depth > 1 for depth in depths) * 2 > len(depths)
