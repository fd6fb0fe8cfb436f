"""Record files copied once from a bucket or a mounted directory, and read there."""

import base64
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from mae_dist.data import files, open_split
from mae_dist.data.files import temporary_beside
from mae_dist.data.sources import staging
from mae_dist.errors import DataFault, StorageFault
from mae_dist.prepare import tfds_writer
from tests.gcs_emulator import Blob, GcsEmulator, Refused
from tests.test_tfds import ARGUMENTS, prepare_shapes

_BUCKET = "datasets"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data_dir = tmp_path_factory.mktemp("prepared")
    prepare_shapes(data_dir, sizes=[(16, 16)] * 12, fixed=True)
    return data_dir


@pytest.fixture
def bucket(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GcsEmulator]:
    """An emulated Cloud Storage that holds what is prepared."""
    import fsspec

    with GcsEmulator([_BUCKET]) as emulator:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator.url)
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "test")
        monkeypatch.setenv("NO_GCE_CHECK", "true")
        monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        for path in sorted((prepared / "shapes" / "1.0.0").iterdir()):
            emulator.put(_BUCKET, f"tfds/shapes/1.0.0/{path.name}", path.read_bytes(), {})
        fsspec.get_filesystem_class("gcs").clear_instance_cache()  # one made for another emulator
        yield emulator


def _images(data_dir: str | Path, cache_dir: Path, split: str = "train", **changes: object) -> np.ndarray:
    arguments: dict[str, Any] = (
        ARGUMENTS | {"data_dir": str(data_dir), "cache_dir": str(cache_dir), "cache": "stream"} | changes
    )
    dataset = open_split(split, **arguments)
    return dataset.examples(np.arange(dataset.num_examples))["image"]


def _copies(cache_dir: Path, split: str) -> list[Path]:
    return sorted(cache_dir.glob(f"staged/**/*{split}.array_record*"))


def test_a_bucket_is_copied_once_and_as_far_as_needed(
    prepared: Path, bucket: GcsEmulator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"gs://{_BUCKET}/tfds"
    images = _images(url, tmp_path)
    np.testing.assert_array_equal(images, _images(prepared, tmp_path))
    assert len(_copies(tmp_path, "train")) == 1
    assert not _copies(tmp_path, "test")
    names = [name for name in bucket.buckets[_BUCKET] if ".array_record" in name]
    objects = {name: bucket.buckets[_BUCKET].pop(name) for name in names}
    np.testing.assert_array_equal(_images(url, tmp_path), images)  # nothing is fetched again
    with pytest.raises(DataFault, match=r"gs://datasets/.*test.* is missing"):
        _images(url, tmp_path, "test")
    with pytest.raises(DataFault, match=r"gs://datasets/tfds holds no prepared cifar10"):
        _images(url, tmp_path, name="cifar10")

    class Known(Blob):
        """The bucket knows of it what `metadata` says."""

        def resource(self) -> dict[str, Any]:
            known = super().resource()
            del known["md5Hash"]  # as of an object composed of several
            return known | self.metadata

    def put(**checksum: bytes) -> None:
        known = {kind: base64.b64encode(value).decode() for kind, value in checksum.items()}
        bucket.buckets[_BUCKET] |= {o.name: Known(o.name, _BUCKET, o.data, metadata=known) for o in objects.values()}

    (test_data,) = (blob.data for name, blob in objects.items() if "test" in name)
    for corrupted in ({"md5Hash": bytes(16)}, {"crc32c": bytes(4)}):
        put(**corrupted)
        with pytest.raises(
            DataFault, match=r"copy of gs://datasets/.*test.* is not what is there \(its checksum differs\)"
        ):
            _images(url, tmp_path, "test")
    assert not _copies(tmp_path, "test")
    put(crc32c=google_crc32c.Checksum(test_data).digest())
    with caplog.at_level(logging.INFO):
        assert len(_images(url, tmp_path, "test")) == 6
    assert "1 of 1 files" in caplog.text


def test_a_mounted_directory_is_copied_if_asked_and_again_if_it_changed(prepared: Path, tmp_path: Path) -> None:
    source, cache = tmp_path / "mount", tmp_path / "cache"
    subprocess.run(["cp", "-r", prepared, source], check=True)
    images = _images(source, cache)
    assert not cache.exists()  # read where it is
    np.testing.assert_array_equal(_images(source, cache, stage=True), images)
    (copy,) = _copies(cache, "train")
    copy.with_name(f".{copy.name}.{socket.gethostname()}.1.tmp").write_bytes(b"left by a killed process")
    copy.unlink()
    np.testing.assert_array_equal(_images(source, cache, stage=True), images)
    assert [path.name for path in copy.parent.glob(".*")] == [".staging.lock"]
    prepare_shapes(tmp_path / "other", sizes=[(16, 16)] * 9, fixed=True)
    subprocess.run(["rm", "-r", source], check=True)
    subprocess.run(["mv", tmp_path / "other", source], check=True)
    assert len(_images(source, cache, stage=True)) == 9


def test_without_locks_hosts_write_to_names_of_their_own(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(handle: object, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    images = _images(prepared, tmp_path, stage=True)
    assert "cannot be locked ([Errno 37] No locks available)" in caplog.text
    (copy,) = _copies(tmp_path, "train")
    copy.unlink()
    other = copy.with_name(f".{copy.name}.elsewhere.{os.getpid()}.tmp")
    other.write_bytes(b"under way on another host")
    np.testing.assert_array_equal(_images(prepared, tmp_path, stage=True), images)
    assert other.read_bytes() == b"under way on another host"
    assert temporary_beside(copy) != other
    monkeypatch.setattr(files.socket, "gethostname", lambda: "elsewhere")
    assert temporary_beside(copy) == other


def test_a_fault_is_blamed_on_its_side(
    prepared: Path, bucket: GcsEmulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    cache.write_text("no directory")
    url = f"gs://{_BUCKET}/tfds"
    for source, stage in ((url, False), (prepared, True)):
        with pytest.raises(StorageFault, match=rf"cannot read or write {cache}/staged/.*Not a directory"):
            _images(source, cache, stage=stage)
    cache.unlink()
    temporary = temporary_beside
    monkeypatch.setattr(staging, "temporary_beside", lambda path: Path("/dev/full"))
    for source, stage in ((url, False), (prepared, True)):
        with pytest.raises(StorageFault, match=rf"cannot read or write {cache}/staged/.*No space left on device"):
            _images(source, cache, stage=stage)
    monkeypatch.setattr(staging, "temporary_beside", temporary)
    find = bucket.find

    def refused(bucket_name: str, name: str) -> Blob:
        if "test.array_record" in name:
            raise Refused(403, "not for you")
        return find(bucket_name, name)

    monkeypatch.setattr(bucket, "find", refused)
    assert len(_images(url, cache)) == 12
    with pytest.raises(StorageFault, match=r"cannot read or write gs://datasets/tfds/.*test\.array_record.* Forbidden"):
        _images(url, cache, "test")


def test_too_little_space_is_told_before(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = tfds_writer.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(tfds_writer.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataFault, match=r"has 0\.00 GB free and .* choose a place on a larger disk"):
        _images(prepared, tmp_path, stage=True)


def test_processes_of_a_host_copy_once(
    prepared: Path, tmp_path: Path, child_env: Callable[..., dict[str, str]]
) -> None:
    code = (
        "import logging, sys; logging.basicConfig(level=logging.INFO); from pathlib import Path; "
        "from tests.test_staging import _images; print(_images(sys.argv[1], Path(sys.argv[2]), stage=True).sum())"
    )
    command = [sys.executable, "-c", code, os.fspath(prepared), os.fspath(tmp_path)]
    pipe = subprocess.PIPE
    children = [subprocess.Popen(command, env=child_env(), stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    outputs = [child.communicate() for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert sum("copying 1 files" in errors for _, errors in outputs) == 1
