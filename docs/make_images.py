"""Draws the pictures of README from a run on CIFAR-10.

python -m mae_dist.main --config configs/cifar_small.py --config.total_epochs=40 --config.optim.warmup_epochs=5
python docs/make_images.py runs/cifar_small
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

import mae_dist
from mae_dist.data.from_config import open_dataset

OUT = Path(__file__).parent / "images"
SIDE, GAP = 100, 6  # of an image in the pictures, and between two, in pixels
COLUMNS = 8


def sheet(rows: list[np.ndarray], *, apart: int = 0) -> Image.Image:
    """Puts rows of images (n, H, W, 3), in 0..1, below each other; `apart` widens the gap after the first column."""
    width = COLUMNS * (SIDE + GAP) - GAP + apart
    page = Image.new("RGB", (width, len(rows) * (SIDE + GAP) - GAP), "white")
    for i, row in enumerate(rows):
        for j, image in enumerate(row[:COLUMNS]):
            picture = Image.fromarray(np.uint8(np.clip(image, 0, 1) * 255 + 0.5))
            left = j * (SIDE + GAP) + (apart if j else 0)
            page.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, i * (SIDE + GAP)))
    return page


def main(workdir: str) -> None:
    """Writes both pictures; the images are test images of different classes, the first ones of each."""
    run = mae_dist.open_run(workdir)
    test = open_dataset(run.config, run.config.data.test_split).examples(np.arange(2_000))
    train = open_dataset(run.config, run.config.data.train_split).examples(np.arange(40_000))["image"]
    first = [np.flatnonzero(test["label"] == label) for label in range(10)]

    chosen = test["image"][[first[label][1] for label in (8, 7, 1, 3, 0, 9, 6, 4)]]
    restored = run.reconstruct(chosen)
    sheet([restored[name] for name in ("original", "masked", "with_visible")]).save(
        OUT / "reconstructions.jpg", quality=90
    )

    queries = test["image"][[first[label][0] for label in (8, 7, 1, 0)]]
    encoder = run.encoder()
    found, _ = mae_dist.neighbours(encoder.features(train), encoder.features(queries), COLUMNS - 1)
    rows = [np.concatenate([query[None], train[near]]) / 255 for query, near in zip(queries, found, strict=True)]
    sheet(rows, apart=14).save(OUT / "neighbours.jpg", quality=90)


if __name__ == "__main__":
    main(sys.argv[1])
