"""Resampling: the pixels of Pillow's bicubic, along each axis by itself, whatever grows or shrinks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mae_dist.data.resample import resize_box, resize_boxes

BICUBIC = Image.Resampling.BICUBIC
Box = tuple[float, float, float, float]


def pillows(image: Image.Image, size: tuple[int, int], box: Box | None = None) -> np.ndarray:
    """Pillow's bicubic of a box (top, left, height, width), int: the width first, as it always was before Pillow 13."""
    top, left, height, width = box or (0, 0, image.height, image.width)
    narrow = image.resize((size[1], image.height), BICUBIC, box=(left, 0, left + width, image.height))
    return np.asarray(narrow.resize((size[1], size[0]), BICUBIC, box=(0, top, size[1], top + height))).astype(int)


def _stripes(height: int, width: int) -> np.ndarray:
    """The finest that there are: lying in one channel, standing in the next, both in the third."""
    y, x = np.indices((height, width))
    return (np.stack([y % 2, x % 2, (x + y) % 2], axis=-1) * 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("shape", "size", "low", "high"),
    [((400, 200), (64, 256), 121, 134), ((100, 100), (32, 128), 116, 139), ((40, 30), (32, 32), 61, 194)],
)
def test_an_axis_that_shrinks_is_smoothed_whatever_the_other_does(
    shape: tuple[int, int], size: tuple[int, int], low: int, high: int
) -> None:
    for turn in (False, True):
        image = np.zeros((*shape, 3), np.uint8)
        image[::2] = 255
        out = np.zeros((*size, 3), np.uint8)
        if turn:
            image, out = image.swapaxes(0, 1).copy(), out.swapaxes(0, 1).copy()
        resize_box(image, (0, 0, *image.shape[:2]), out)
        assert (out.min(), out.max()) == (low, high)


@given(st.data())
def test_any_box_to_any_size_is_pillows(data: st.DataObject) -> None:
    """Shrinking by up to 40 and growing, mixed; boxes with edges within pixels, down to a fraction of one."""
    height, width = (data.draw(st.integers(1, 120), label=name) for name in ("height", "width"))
    size = data.draw(st.tuples(st.integers(1, 90), st.integers(1, 90)), label="size")
    channels = data.draw(st.sampled_from([1, 3, 4]), label="channels")
    box_height, box_width = (data.draw(st.floats(0.4, edge), label="box") for edge in (height, width))
    top, left = (data.draw(st.floats(0, room), label="place") for room in (height - box_height, width - box_width))
    seed = data.draw(st.integers(0, 9), label="seed")
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8)
    if seed % 2:
        image[..., :3] = _stripes(height, width)
    image = np.ascontiguousarray(image[..., :channels])
    out = np.zeros((*size, channels), np.uint8)
    # Pillow computes with the product of colour and alpha where there is one, so that here each channel is an image.
    planes = [Image.fromarray(np.ascontiguousarray(image[..., channel])) for channel in range(channels)]

    def differs(box: Box, planes: list[Image.Image]) -> int:
        expected = np.stack([pillows(plane, size, box) for plane in planes], axis=-1)
        return int(np.abs(out - expected).max())

    # Both round twice: at most a level apart after the first, which the second may enlarge a little.
    box = (top, left, box_height, box_width)
    resize_box(image, box, out, margin=True)
    assert differs(box, planes) <= 2
    top, left, box_height, box_width = int(top), int(left), max(1, int(box_height)), max(1, int(box_width))
    resize_box(image, (top, left, box_height, box_width), out)
    crop = (left, top, left + box_width, top + box_height)
    assert differs((0, 0, box_height, box_width), [plane.crop(crop) for plane in planes]) <= 2


@pytest.mark.parametrize("channels", [1, 3])
def test_boxes_of_a_batch_are_resized_as_each_alone(channels: int) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 30, 20, channels), np.uint8)
    sizes = rng.integers(1, (31, 21), (40, 2))
    sizes[:3] = (30, 20), (30, 7), (9, 20)
    boxes = np.concatenate([rng.integers(0, (31, 21) - sizes), sizes], axis=1)
    together, alone = (np.zeros((40, 16, 24, channels), np.uint8) for _ in range(2))
    resize_boxes(images, boxes, together)
    for image, box, out in zip(images, boxes.tolist(), alone, strict=True):
        resize_box(image, box, out)
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("size", [(224, 224), (32, 32), (300, 40)])
def test_large_images_are_computed_in_parts_that_fit_together(size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 1600, 3), np.uint8))
    out = np.zeros((*size, 3), np.uint8)
    resize_box(np.asarray(image), (0, 0, 700, 1600), out)
    difference = np.abs(out - pillows(image, size))
    assert difference.max() <= 1
    assert difference.mean() < 0.005


def test_a_box_that_is_not_resized_passes_unchanged() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    for margin in (False, True):
        out = np.zeros((20, 30, 3), np.uint8)
        resize_box(image, (7, 9, 20, 30), out, margin=margin)
        np.testing.assert_array_equal(out, image[7:27, 9:39])
