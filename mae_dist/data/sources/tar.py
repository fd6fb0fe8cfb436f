"""WebDataset's tar files, read where they are: `data.source="tar"`.

Members of one key (their path up to the first dot of its last part) are one example: an image by its suffix, and a
label in `.cls` or as "label" in `.json`. Where each image lies is found once, and kept in the cache.
"""

import functools
import json
import logging
import os
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from mae_dist.data.dataset import Dataset, digest
from mae_dist.data.decode import Decoder
from mae_dist.data.image_files import MAX_PIXELS
from mae_dist.data.sources import listing as listings
from mae_dist.data.sources import register_source
from mae_dist.data.sources.cache import cache_root
from mae_dist.data.sources.listed import (
    SPLIT_TYPE,
    ListedDataset,
    make_table,
    number_labels,
    open_listed,
    split_of_file,
    survey,
)
from mae_dist.data.sources.listing import SUFFIXES, LeftOut, Listing, readable
from mae_dist.errors import DataFault

_THREADS = 16  # they wait for the disk
_BLOCK = 512  # of a tar file
_RULES = 1  # of the index: raise it when it is made differently
_NO_IMAGE, _SECOND_IMAGE = "no image of a known suffix", "a further image of the same key"
_LOG = logging.getLogger(__name__)


class _Member(NamedTuple):
    """An image in a tar file."""

    name: bytes
    offset: int
    size: int
    label: str  # "" without one


class _Index(NamedTuple):
    """The images of all shards: arrays with a value of each. # (N,)"""

    names: list[bytes]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    labels: list[str]
    left_out: list[tuple[bytes, str]]


class TarDataset(ListedDataset):
    """Reads members of tar files."""

    def __init__(self, shards: Listing, index: _Index, listing: Listing, rows: np.ndarray, *rest: Any, **fields: Any):
        """Takes the members at `rows` of the index; `rest` and `fields` are for `ListedDataset`."""
        super().__init__(listing, rows, *rest, **fields)
        self._paths = [os.path.join(shards.root, name) for name in shards.names]
        self._spans = np.stack([index.shard, index.offset, index.size], axis=1)[rows]  # (n, 3)

    def files(self, indices: np.ndarray) -> list[bytes | None]:
        return [_read(self._paths[shard], offset, size) for shard, offset, size in self._spans[indices].tolist()]


def _read(path: bytes, offset: int, size: int) -> bytes | None:
    try:
        with open(path, "rb") as file:
            data = os.pread(file.fileno(), size, offset)
    except OSError:  # named like one that does not decode
        return None
    return data if len(data) == size else None


@register_source("tar")
def open_tar(
    split: str,
    *,
    data_dir: str,
    image_size: tuple[int, int],
    channels: int,
    cache: str,
    cache_dir: str,
    max_bad_share: float,
    labels: str = "none",
    val_fraction: float = 0.0,
    dtype: str = "auto",
    max_value: float = 0.0,
    background: float = 1.0,
    max_pixels: int = MAX_PIXELS,
    exif: bool = True,
    shared: dict[str, Any],
) -> Dataset:
    """Opens WebDataset's shards.

    The base splits are "train", "val" and "test" (and "all"), by words in the names of shards, or of their directories;
    other shards are "train". Without a shard of "val" a fraction of "train", drawn by a hash of each key, is "val".

    Args:
      split: a split expression, as for `open_split`.
      data_dir: .tar files: a directory, several paths separated by commas, or a glob.
      labels: "none"; or "cls": the number or name in a member `.cls`, or else the "label" in `.json`.
      val_fraction: of the examples of "train".

    The other arguments are those of `open_folder`.

    Raises:
      ConfigError: an argument that cannot work.
      DataFault: a shard is corrupted or compressed, or there is no image, or none that decodes.
    """
    if "opened" not in shared:
        shards = listings.find_files(data_dir, (b".tar",), "tar", "tar file")
        index = _load_index(shards, cache_dir)
        left_out = LeftOut()
        for name, reason in index.left_out:
            left_out.add(name, reason)
        names = [shards.names[shard] + b"/" + name for shard, name in zip(index.shard, index.names, strict=True)]
        if not names:
            raise DataFault(f"the tar files of data.data_dir={data_dir} hold no image; {left_out}")
        listing = Listing(shards.root, names, index.size, shards.times[index.shard], left_out)
        of_shard = np.array([split_of_file(name) for name in shards.names], SPLIT_TYPE)
        texts = {row: text for row, text in enumerate(index.labels) if text} if labels == "cls" else {}
        if labels == "cls" and not texts:
            raise DataFault(
                f'{readable(shards.root)} has no labels, neither .cls nor .json with a "label"; set '
                "data.labels='none' to train without"
            )
        keys = [_split_name(name)[0] for name in index.names]
        table = make_table(keys, of_shard[index.shard], *number_labels(texts, len(names)), val_fraction)
        shared["opened"] = survey(
            functools.partial(TarDataset, shards, index),
            listing,
            table,
            lambda row: _read(
                os.path.join(shards.root, shards.names[index.shard[row]]), int(index.offset[row]), int(index.size[row])
            ),
            Decoder(channels, "float32", max_value, background, exif, max_pixels=max_pixels),
            dtype,
            cache_dir=cache_dir,
        )
    return open_listed(
        split,
        shared["opened"],
        source="tar",
        image_size=image_size,
        cache=cache,
        cache_dir=cache_dir,
        max_bad_share=max_bad_share,
    )


def _load_index(shards: Listing, cache_dir: str) -> _Index:
    """Returns where the images are, from the cache if it was made from the same files."""
    files = {readable(name): (size, time) for name, size, time in _stats(shards)}
    key = digest({"rules": _RULES, "root": readable(shards.root), "files": files})
    path = cache_root(cache_dir) / "tar" / f"{key}.npz"
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            texts = {name: _unjoin(stored[name]) for name in ("names", "labels", "left_out", "reasons")}
            arrays = [stored[name] for name in ("shard", "offset", "size")]
        labels, reasons = ([text.decode() for text in texts[name]] for name in ("labels", "reasons"))
        shard, offset, size = arrays
        return _Index(texts["names"], shard, offset, size, labels, list(zip(texts["left_out"], reasons, strict=True)))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        index = _make_index(shards)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{key}.{os.getpid()}.npz")
        np.savez(
            temporary,
            names=_join(index.names),
            shard=index.shard,
            offset=index.offset,
            size=index.size,
            labels=_join([label.encode() for label in index.labels]),
            left_out=_join([name for name, _ in index.left_out]),
            reasons=_join([reason.encode() for _, reason in index.left_out]),
        )
        temporary.rename(path)
    except OSError as error:
        _LOG.warning("the index of tar files is made again next time, it cannot be kept: %s", error)
    return index


def _stats(shards: Listing) -> list[tuple[bytes, int, int]]:
    return list(zip(shards.names, shards.sizes.tolist(), shards.times.tolist(), strict=True))


def _join(texts: list[bytes]) -> np.ndarray:
    """Returns texts without zero bytes as one array, each followed by one."""
    return np.frombuffer(b"".join(text + b"\0" for text in texts), np.uint8)


def _unjoin(array: np.ndarray) -> list[bytes]:
    return array.tobytes().split(b"\0")[:-1]


def _make_index(shards: Listing) -> _Index:
    paths = [os.path.join(shards.root, name) for name in shards.names]
    members: list[_Member] = []
    numbers: list[int] = []
    left_out: list[tuple[bytes, str]] = []
    with ThreadPoolExecutor(_THREADS) as pool, tqdm(total=len(paths), desc="indexing tar files", disable=None) as bar:
        for number, (found, others) in enumerate(pool.map(_images_of, paths)):
            members += found
            numbers += [number] * len(found)
            left_out += [(shards.names[number] + b"/" + name, reason) for name, reason in others]
            bar.update()
    return _Index(
        [member.name for member in members],
        np.array(numbers, np.int64),
        np.array([member.offset for member in members], np.int64),
        np.array([member.size for member in members], np.int64),
        [member.label for member in members],
        left_out,
    )


def _images_of(path: bytes) -> tuple[list[_Member], list[tuple[bytes, str]]]:
    """Returns the images of a shard, and what is left out with the reason."""
    images: dict[bytes, list[_Member]] = {}
    labels: dict[bytes, str] = {}
    keys: dict[bytes, bytes] = {}  # -> name of a member
    end = 0
    with open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    end = member.offset_data + (-(-member.size // _BLOCK) * _BLOCK if member.isreg() else 0)
                    name = os.fsencode(member.name)
                    key, suffix = _split_name(name)
                    if not member.isreg() or not suffix:
                        continue
                    keys.setdefault(key, name)
                    if b"." + suffix.rpartition(b".")[2] in SUFFIXES:
                        images.setdefault(key, []).append(_Member(name, member.offset_data, member.size, ""))
                    elif suffix in (b"cls", b"json") and not (suffix == b"json" and key in labels):
                        content = tar.extractfile(member)
                        text = _label_of(suffix, content.read() if content else b"")
                        if text:
                            labels[key] = text
        except (tarfile.TarError, EOFError) as error:
            raise DataFault(
                f"{readable(path)} is no plain tar file, or corrupted ({error}); uncompress it, or restore it"
            ) from error
        file.seek(end)  # zeros follow, but for a header that tarfile took for the end, or another archive
        if any(chunk.strip(b"\0") for chunk in iter(lambda: file.read(2**20), b"")):
            raise DataFault(f"{readable(path)} is corrupted after byte {end}, or several tar files in one; restore it")
    left_out = [(name, _NO_IMAGE) for key, name in keys.items() if key not in images]
    chosen = []
    for key, members in images.items():
        first, *others = sorted(
            members, key=lambda member: b"." in _split_name(member.name)[1]
        )  # 1.png, then 1.mask.png
        chosen.append(first._replace(label=labels.get(key, "")))
        left_out += [(other.name, _SECOND_IMAGE) for other in others]
    return chosen, left_out


def _split_name(name: bytes) -> tuple[bytes, bytes]:
    """Splits a member's name into its key and its suffix, in lower case; "" for hidden files and those without."""
    directory, _, last = name.rpartition(b"/")
    stem, _, suffix = last.partition(b".")
    return (directory + b"/" + stem if directory else stem), suffix.lower() if stem else b""


def _label_of(suffix: bytes, content: bytes) -> str:
    """Returns the label in a member, "" if there is none."""
    if suffix == b"cls":
        return content.decode(errors="replace").strip().replace("\0", "")
    try:
        label = json.loads(content)["label"]
    except (ValueError, KeyError, TypeError):
        return ""
    return str(label) if isinstance(label, int | str) else ""
