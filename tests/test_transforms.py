"""Decoding, crop boxes that stay inside their images, and flips."""

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_dist.errors import ConfigError
from mae_dist.transforms import (
    CROP_UNIFORMS,
    Augment,
    RandomCrops,
    UndecodableImage,
    center_box,
    crop_images,
    crop_resize,
    decode_image,
    flip_images,
    random_crop_boxes,
    resize_images,
)

SIDES = st.integers(1, 700)


def _gradient(height: int, width: int, channels: int = 3) -> np.ndarray:
    """A smooth image with another slope in every channel. # uint8 (height, width, channels)"""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    planes = [np.cos(k) ** 2 * x + np.sin(k) ** 2 * y for k in range(channels)]
    return np.rint(255 * np.stack(planes, axis=-1)).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_decodes_to_the_exact_pixels_in_rgb_order(channels: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (7, 5, channels), dtype=np.uint8)
    order = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]  # OpenCV encodes from BGR(A)
    data = cv2.imencode(".png", image[..., order])[1].tobytes()
    np.testing.assert_array_equal(decode_image(data, channels), image)


@pytest.mark.parametrize("extension", [".jpg", ".png"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.9])
def test_cut_files_do_not_decode(extension: str, kept: float) -> None:
    data = cv2.imencode(extension, _gradient(64, 64))[1].tobytes()
    with pytest.raises(UndecodableImage):
        decode_image(data[: int(kept * len(data))], 3)


def test_an_rgb_image_has_no_alpha_channel() -> None:
    data = cv2.imencode(".png", _gradient(8, 8))[1].tobytes()
    with pytest.raises(UndecodableImage, match="4 channels"):
        decode_image(data, 4)


@given(SIDES, SIDES, SIDES, SIDES, st.floats(1, 2))
def test_center_box_is_inside_and_central(height: int, width: int, to_height: int, to_width: int, zoom: float) -> None:
    top, left, box_height, box_width = center_box(height, width, (to_height, to_width), zoom)
    assert box_height >= 1
    assert box_width >= 1
    assert 0 <= top <= height - box_height - top <= top + 1
    assert 0 <= left <= width - box_width - left <= left + 1
    if zoom == 1:
        assert box_height == height or box_width == width


def test_evaluation_zoom_keeps_seven_eighths() -> None:
    assert center_box(256, 400, (224, 224), 256 / 224) == (16, 88, 224, 224)


@given(
    st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=8),
    st.integers(0, 2**32 - 1),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(lambda pair: (min(pair), max(pair))),
    st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)).map(lambda pair: (min(pair), max(pair))),
)
def test_random_crops_are_inside_their_images(
    sizes: list[tuple[int, int]], seed: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    uniforms = np.random.default_rng(seed).random((len(sizes), CROP_UNIFORMS))
    heights, widths = np.array(sizes).T
    boxes = random_crop_boxes(uniforms, heights, widths, scale, ratio)
    top, left, box_heights, box_widths = boxes.T
    assert (box_heights >= 1).all()
    assert (box_widths >= 1).all()
    assert ((top >= 0) & (top + box_heights <= heights)).all()
    assert ((left >= 0) & (left + box_widths <= widths)).all()


def test_random_crops_have_the_area_and_aspect_asked_for() -> None:
    count, side = 4000, 500
    uniforms = np.random.default_rng(0).random((count, CROP_UNIFORMS))
    sides = np.full(count, side)
    top, left, heights, widths = random_crop_boxes(uniforms, sides, sides, (0.2, 1.0), (3 / 4, 4 / 3)).T
    area, aspect = heights * widths / side**2, widths / heights
    assert area.min() >= 0.199
    assert area.max() <= 1
    assert aspect.min() >= 0.745
    assert aspect.max() <= 1.342
    assert abs(np.log(aspect).mean()) < 0.02  # wide and tall alike
    assert abs((top - (side - heights - top)).mean()) < 5  # centred on average
    assert abs((left - (side - widths - left)).mean()) < 5


def test_a_crop_that_never_fits_falls_back_to_the_centre() -> None:
    boxes = random_crop_boxes(
        np.full((1, CROP_UNIFORMS), 0.5), np.array([10]), np.array([1000]), (0.9, 1), (0.75, 1.33)
    )
    assert boxes.tolist() == [[0, 493, 10, 13]]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [12, 64])
def test_crop_resize_keeps_the_picture(channels: int, side: int) -> None:
    whole = _gradient(90, 80, channels)
    out = np.zeros((side, side, channels), np.uint8)
    crop_resize(whole, (10, 20, 30, 30), out)
    step = 30 / side
    at = np.arange(side) * step + step / 2 - 0.5  # pixel centres
    expected = whole[10 + np.rint(at).astype(int)][:, 20 + np.rint(at).astype(int)]
    assert np.abs(out.astype(int) - expected.astype(int)).max() <= 6


def test_shrinking_averages_instead_of_aliasing() -> None:
    checkers = np.indices((64, 64)).sum(axis=0)[..., None] % 2 * 255
    out = np.zeros((16, 16, 1), np.uint8)
    crop_resize(checkers.astype(np.uint8), (0, 0, 64, 64), out)
    assert set(np.unique(out)) <= {127, 128}


def test_whole_images_pass_unchanged() -> None:
    images = np.stack([_gradient(9, 9)] * 2)
    assert resize_images(images, (9, 9)) is images
    crops = RandomCrops(np.full((2, CROP_UNIFORMS), 0.5), (1.0, 1.0), (1.0, 1.0))
    np.testing.assert_array_equal(crop_images(images, crops), images)


@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_flip_mirrors_only_the_chosen_rows(flip: list[bool]) -> None:
    images = np.stack([_gradient(4, 5)] * len(flip))
    flipped = flip_images(images.copy(), np.array(flip))
    for image, before, mirrored in zip(flipped, images, flip, strict=True):
        np.testing.assert_array_equal(image, before[:, ::-1] if mirrored else before)
    np.testing.assert_array_equal(flip_images(flipped, np.array(flip)), images)


@pytest.mark.parametrize(
    ("field", "value"),
    [("kind", "mirror"), ("crop_scale", (0.0, 1.0)), ("crop_scale", (0.5, 0.2)), ("crop_ratio", (2.0, 1.0))],
)
def test_an_augment_that_cannot_work_is_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field.split("_")[0]):
        Augment(**{field: value})  # type: ignore[arg-type]
