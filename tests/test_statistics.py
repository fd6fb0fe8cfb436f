"""Mean and standard deviation of a data set's pixels: exact, of evenly spaced images, stored once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mae_dist import get_config
from mae_dist.data import ArrayDataset, from_config, open_split, statistics
from mae_dist.errors import DataFault
from tests.test_folder import write

RNG = np.random.default_rng(0)


def arrays(dtype: Any, count: int = 37, offset: int = 0) -> ArrayDataset:
    top = 1 if dtype == np.float32 else 50
    images = (RNG.random((count, 6, 5, 3)) * [top, top * 0.5, top * 0.1] + offset).astype(dtype)
    return ArrayDataset({"image": images, "label": np.zeros(count, np.int32)}, num_classes=1)


@pytest.mark.parametrize(
    ("dtype", "max_value", "top"), [("uint8", 0.0, 255), ("uint16", 4095.0, 4095), ("uint16", 0.0, 65535)]
)
def test_as_numpy_computes_them(dtype: str, max_value: float, top: int) -> None:
    dataset = arrays(dtype)
    mean, std = statistics.measure(dataset, max_value=max_value)
    pixels = dataset.columns["image"].astype(np.float64) / top
    np.testing.assert_allclose(mean, pixels.mean((0, 1, 2)), rtol=1e-13)
    np.testing.assert_allclose(std, pixels.std((0, 1, 2)), rtol=1e-13)


def test_small_deviations_do_not_cancel() -> None:
    """Of fractions near one number, float32 sums or a difference of squares would leave nothing."""
    dataset = arrays(np.float32)
    images = (0.7 + dataset.columns["image"] * 1e-5).astype(np.float32)
    _, std = statistics.measure(ArrayDataset({"image": images}, num_classes=0))
    np.testing.assert_allclose(std, images.astype(np.float64).std((0, 1, 2)), rtol=1e-8)


def test_evenly_spaced_images() -> None:
    dataset = arrays(np.uint8, count=100)
    mean, _ = statistics.measure(dataset, limit=10)
    np.testing.assert_allclose(mean, dataset.columns["image"][::10].astype(float).mean((0, 1, 2)) / 255)


def test_a_channel_that_does_not_vary() -> None:
    images = np.full((3, 4, 4, 1), 51, np.uint8)
    assert statistics.measure(ArrayDataset({"image": images}, num_classes=0)) == ((0.2,), (1.0,))


def test_they_are_stored_by_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = arrays(np.uint8)
    cache = str(tmp_path / "cache")
    assert statistics.load_stats(dataset.fingerprint, cache) is None
    first = statistics.measured(dataset, cache)
    assert statistics.load_stats(dataset.fingerprint, cache) == first == statistics.measure(dataset)
    monkeypatch.setattr(statistics, "measure", None)
    assert statistics.measured(dataset, cache) == first
    (stored,) = (tmp_path / "cache" / "statistics").iterdir()
    stored.write_text("{")
    assert statistics.load_stats(dataset.fingerprint, cache) is None
    (tmp_path / "file").touch()
    statistics.store_stats(dataset.fingerprint, first, str(tmp_path / "file"))  # warns only


def test_images_that_cannot_be_read_are_passed_over(tmp_path: Path) -> None:
    root = tmp_path / "images"
    write(*(root / f"{i}.png" for i in range(5)), shape=(8, 8, 3))
    options: dict[str, Any] = {
        "source": "folder",
        "data_dir": str(root),
        "channels": 3,
        "image_size": (8, 8),
        "cache": "stream",
        "cache_dir": str(tmp_path / "cache"),
        "max_bad_share": 0.5,
    }
    whole = statistics.measure(open_split("all", **options))
    (root / "text.png").write_text("no image")
    np.testing.assert_allclose(statistics.measure(open_split("all", **options)), whole)
    broken = open_split("all", **options)
    for path in root.iterdir():
        path.write_text("no image")
    with pytest.raises(DataFault, match="none can be read"):
        statistics.measure(broken)


def test_a_config_without_them_gets_those_of_its_range() -> None:
    """As fractions of data.max_value, which the model divides by too."""
    config = get_config("smoke")
    config.data.update(mean=(), std=(), max_value=4095.0)
    images = np.full((4, 4, 4, 1), 4095, np.uint16)
    images[::2] = 0
    train = ArrayDataset({"image": images}, num_classes=0, fingerprint="as it is")
    completed = from_config.complete(config, from_config.Data(train, None, None))
    assert (completed.data.mean, completed.data.std) == ((0.5,), (0.5,))
