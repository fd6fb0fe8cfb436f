"""The usual input pipeline in PyTorch, with Pillow and a DataLoader, for `mae_dist.benchmark --against torch`.

It reads its options as the line `{"spans": […], …}`, or `{"files": […], …}`, and prints `ready`; for each further line
`<n>` it prints the seconds that n batches took. Random resized crop and flip are torchvision's, written out.
"""

import io
import json
import math
import sys
import time
from typing import Any

import numpy as np


def crop_box(width: int, height: int, scale: list[float], ratio: tuple[float, float] = (3 / 4, 4 / 3)) -> Any:
    """Returns (left, top, right, bottom) as torchvision's RandomResizedCrop does; the whole image after ten misses."""
    import torch

    for _ in range(10):
        area = height * width * torch.empty(1).uniform_(*scale).item()
        aspect = math.exp(torch.empty(1).uniform_(*map(math.log, ratio)).item())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(0, height - h + 1, (1,)).item())
            left = int(torch.randint(0, width - w + 1, (1,)).item())
            return left, top, left + w, top + h
    return 0, 0, width, height


class Images:
    """A map-style dataset of image files; an example is (uint8 tensor (C, H, W), label)."""

    def __init__(self, files: list[str], image_size: list[int], mode: str, scale: list[float]):
        self._files, self._image_size, self._mode, self._scale = files, image_size, mode, scale

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> tuple[Any, int]:
        """Returns the file, open, and the label."""
        return open(self._files[index], "rb"), 0

    def __getitem__(self, index: int) -> Any:
        import torch
        from PIL import Image

        file, label = self.read(index)
        image = Image.open(file).convert(self._mode)
        image = image.crop(crop_box(*image.size, self._scale))
        image = image.resize(self._image_size[::-1], Image.Resampling.BICUBIC)
        if torch.rand(1).item() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.array(image).reshape(*self._image_size, -1)
        return torch.from_numpy(pixels).permute(2, 0, 1), label


class Records(Images):
    """The same of array_record files."""

    def __init__(self, spans: list[str], *options: Any):
        super().__init__([], *options)
        self._spans = spans
        self._source: Any = None  # opened by each worker for itself
        self._length = sum(int(stop) - int(start) for start, stop in (_span(span) for span in spans))

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> tuple[Any, int]:
        from array_record.python import array_record_data_source
        from tensorflow_datasets.proto import tf_example_pb2

        if self._source is None:
            self._source = array_record_data_source.ArrayRecordDataSource(self._spans)
        example: Any = tf_example_pb2.Example.FromString(self._source[index])  # pyright: ignore[reportAttributeAccessIssue]
        feature = example.features.feature
        label = feature["label"].int64_list.value  # empty in a set without labels
        return io.BytesIO(feature["image"].bytes_list.value[0]), label[0] if label else -1


def _span(span: str) -> list[str]:
    """Returns the numbers of `file[start:stop]`."""
    return span[span.rindex("[") + 1 : -1].split(":")


def serve(options: dict[str, Any]) -> None:
    """Takes the first batch, then as many as each line of the input asks for."""
    import torch

    torch.set_num_threads(1)  # of one process; the workers are the parallelism
    kind, place = (Images, options["files"]) if "files" in options else (Records, options["spans"])
    dataset: Any = kind(place, options["image_size"], options["mode"], options["scale"])
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=options["batch_size"],
        # Every image is drawn anew: a pass that ends would start over with empty buffers.
        sampler=torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=1 << 40),
        num_workers=options["num_workers"],
    )
    batches = iter(loader)
    next(batches)
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.monotonic()
        for _ in range(int(line)):
            next(batches)
        print(time.monotonic() - began, flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.stdin.readline()))
