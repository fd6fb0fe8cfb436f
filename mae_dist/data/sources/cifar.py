"""CIFAR-10 and CIFAR-100 prepared by TFDS without TensorFlow, and downloads that fail in seconds, not minutes.

TFDS's own builder reads the archive with tf.io.gfile and encodes PNGs with TensorFlow. The builders here yield encoded
bytes instead, under the same name and version, so what they write is what TFDS itself would read.
"""

import logging
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.image_classification import cifar as tfds_cifar

from mae_dist.data.files import locked
from mae_dist.errors import DataFault

_CONNECT_SECS = 5.0
_PIXEL_BYTES = 3 * 32 * 32
_NO_DOWNLOAD = "configs/quickstart.py (digits) and configs/smoke.py (synthetic) need no download"


class _FromArchive:
    """Reads the binary archive with tarfile and NumPy; mixed into a TFDS CIFAR builder."""

    info: Any
    _cifar_info: Any

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        layout = self._cifar_info
        archive = Path(dl_manager.download(layout.url))
        members = [*layout.train_files, *layout.test_files, *layout.label_files]
        with tarfile.open(archive) as tar:
            content = {name: _member(tar, layout.prefix + name, archive) for name in members}
        for key, name in zip(layout.label_keys, layout.label_files, strict=True):
            self.info.features[key].names = [line for line in content[name].decode().split("\n") if line]
        return {
            "train": self._examples("train_", [content[name] for name in layout.train_files]),
            "test": self._examples("test_", [content[name] for name in layout.test_files]),
        }

    def _examples(self, prefix: str, files: list[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
        keys = self._cifar_info.label_keys
        records = np.frombuffer(b"".join(files), np.uint8).reshape(-1, len(keys) + _PIXEL_BYTES)
        for index, record in enumerate(records):
            image = record[len(keys) :].reshape(3, 32, 32).transpose(1, 2, 0)  # (32, 32, 3)
            png = cv2.imencode(".png", image[..., ::-1])[1].tobytes()  # OpenCV encodes from BGR
            labels = {key: int(label) for key, label in zip(keys, record, strict=False)}
            yield index, {"id": f"{prefix}{index:05d}", "image": png, **labels}


# TFDS would derive `name`, and with it the directory, from the class's name.
class Cifar10FromArchive(  # pyright: ignore[reportIncompatibleMethodOverride]
    _FromArchive, tfds_cifar.Cifar10, skip_registration=True
):
    """Prepares CIFAR-10 3.0.2."""

    name = "cifar10"


class Cifar100FromArchive(  # pyright: ignore[reportIncompatibleMethodOverride]
    _FromArchive, tfds_cifar.Cifar100, skip_registration=True
):
    """Prepares CIFAR-100 3.0.2."""

    name = "cifar100"


BUILDERS: dict[str, type[tfds.core.GeneratorBasedBuilder]] = {
    "cifar10": Cifar10FromArchive,
    "cifar100": Cifar100FromArchive,
}
for _builder in BUILDERS.values():
    # TFDS finds the archive's checksum beside this module, and writes its name to dataset_info.json: another one than
    # its own would be reported as a difference at each start.
    _builder.__module__ = tfds_cifar.__name__


def _member(tar: tarfile.TarFile, name: str, archive: Path) -> bytes:
    try:
        handle = tar.extractfile(name)
    except (KeyError, OSError, EOFError) as error:
        raise DataFault(f"{archive} holds no readable {name} ({error}); download the archive again") from error
    assert handle is not None, name
    return handle.read()


def prepare(builder: Any) -> None:
    """Downloads and prepares what the builder's data_dir does not hold yet, as array_record files.

    Safe when many processes start together: those of one host wait for each other, and TFDS writes to a temporary
    directory that it renames, so that of several hosts the first to finish wins.

    Args:
      builder: a TFDS builder whose data is not prepared; one of `BUILDERS` where TensorFlow is not installed.

    Raises:
      DataFault: no connection, a wrong archive, an unwritable data_dir, or a builder that needs TensorFlow.
    """
    try:
        with locked(Path(builder.data_dir_root) / f".{builder.name}.prepare.lock"):
            if builder.is_prepared():
                return
            _check_archive_or_connection(builder)
            logging.getLogger(__name__).info("preparing %s in %s", builder.name, builder.data_path)
            builder.download_and_prepare(file_format="array_record")
    except DataFault:
        raise
    except ImportError as error:
        raise DataFault(
            f"preparing {builder.name} needs a package that is not installed ({error}); prepare it once where it is: "
            f"tfds build {builder.name} --file_format=array_record --data_dir=<a directory>, then set data_dir to that"
        ) from error
    except Exception as error:
        if builder.is_prepared():  # another host was first, and our rename met its directory
            return
        raise DataFault(
            f"preparing {builder.name} in {builder.data_path} failed: {type(error).__name__}: {error}. "
            "If the archive is corrupted, delete it; if data_dir cannot be written, set data_dir to one that can, "
            f"or to prepared data; {_NO_DOWNLOAD}"
        ) from error


def _check_archive_or_connection(builder: Any) -> None:
    """Raises DataFault in seconds if the archive is neither here nor within reach: TFDS would try for minutes."""
    url = next(iter(builder.url_infos or {}), None)
    if url is None or builder.MANUAL_DOWNLOAD_INSTRUCTIONS:  # files the user brings: TFDS says which
        return
    root = Path(builder.data_dir_root)
    manual = root / "downloads" / "manual" / url.rsplit("/", 1)[1]
    downloaded = (root / "downloads" / builder.name).glob(f"*{url.rsplit('/', 1)[1].split('.')[0][-20:]}*")
    if manual.exists() or any(path.is_file() for path in downloaded):
        return
    problem = _connection_problem(url)
    if problem:
        raise DataFault(
            f"{builder.name} is not prepared in {root} and cannot be downloaded from {url}: {problem}. Either put the "
            f"downloaded file at {manual}, or set data_dir to a TFDS directory that holds prepared {builder.name}; "
            f"{_NO_DOWNLOAD}"
        )


def _connection_problem(url: str) -> str | None:
    """Returns why `url` cannot be fetched, or None. Honours the same proxy variables as the download itself."""
    import requests  # TFDS downloads with it

    result = [f"no answer within {2 * _CONNECT_SECS:g} s"]

    def connect() -> None:
        try:
            with requests.get(url, stream=True, timeout=_CONNECT_SECS) as response:
                result[0] = f"HTTP status {response.status_code}" if response.status_code >= 400 else ""
        except requests.RequestException as error:
            result[0] = f"{type(error).__name__}: {error}"

    # A thread, because the timeout does not cover looking up the host's name.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(2 * _CONNECT_SECS)
    return result[0] or None
