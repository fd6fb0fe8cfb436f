"""Every image decoded once before training."""

from pathlib import Path

import numpy as np
import pytest

from mae_dist.data import open_split
from mae_dist.data.check import check
from tests.test_decode import pillow


def test_broken_and_doubtful_images_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Grey blocks in a JPEG are what the decoder warns of; nothing of it is printed here."""
    root = tmp_path / "images"
    root.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    data = pillow(noise, "JPEG")
    middle = len(data) // 2
    for i in range(70):
        (root / f"{i}.jpg").write_bytes(data)
    (root / "doubtful.jpg").write_bytes(data[: middle - 32] + bytes(64) + data[middle + 32 :])
    (root / "broken.jpg").write_bytes(data[:middle])
    dataset = open_split(
        "all",
        source="folder",
        image_size=(32, 32),
        channels=3,
        data_dir=str(root),
        cache="stream",
        cache_dir=str(tmp_path / "cache"),
        max_bad_share=0.1,
    )
    capfd.readouterr()
    bad, warned = check(dataset, "checking")
    assert [Path(line.partition(" (")[0]).name for line in bad] == ["broken.jpg"]
    assert [Path(line.partition(" (")[0]).name for line in warned] == ["doubtful.jpg"]
    assert "Corrupt JPEG data" in warned[0]
    assert "Corrupt" not in capfd.readouterr().err
