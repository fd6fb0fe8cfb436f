"""RandAugment's operations against Pillow's, and what is drawn for an image."""

import math
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from mae_dist.data import randaugment as augment
from mae_dist.data.randaugment import OPERATIONS, UNIFORMS_PER_LAYER, RandAugment

MOVES = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
TONES = [name for name in OPERATIONS if name not in MOVES]
FILL = (10, 200, 90)
SIDES = st.integers(1, 24)


@st.composite
def images(draw: st.DrawFn) -> np.ndarray:
    """Noise, in all of 0..255 or in few values, as an image of a batch is: uint8 (H, W, C)."""
    shape = draw(SIDES), draw(SIDES), draw(st.sampled_from([1, 3]))
    low = draw(st.integers(0, 255))
    high = draw(st.integers(low, 255))
    return np.random.default_rng(draw(st.integers(0, 2**32))).integers(low, high + 1, shape, dtype=np.uint8)


def smooth(height: int, width: int, channels: int) -> np.ndarray:
    """Like a photograph out of focus: uint8 (H, W, C)."""
    coarse = np.random.default_rng(3).integers(0, 256, (height // 8, width // 8, channels), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).reshape(height, width, channels)


def to_pillow(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def pillow(name: str, image: np.ndarray, level: float, sign: int) -> np.ndarray:
    """timm's operation of that name, by Pillow: uint8 (H, W, C) -> the same."""
    given_image, (height, width, channels) = to_pillow(image), image.shape
    factor = max(0.1, 1 + sign * 0.9 * level)
    how: dict[str, Any] = {"resample": Image.Resampling.BICUBIC, "fillcolor": FILL if channels == 3 else FILL[0]}

    def affine(*matrix: float) -> Image.Image:
        return given_image.transform(given_image.size, Image.Transform.AFFINE, matrix, **how)

    made = {
        "AutoContrast": lambda: ImageOps.autocontrast(given_image),
        "Equalize": lambda: ImageOps.equalize(given_image),
        "Invert": lambda: ImageOps.invert(given_image),
        "Rotate": lambda: given_image.rotate(sign * 30 * level, **how),
        "Posterize": lambda: ImageOps.posterize(given_image, max(1, 4 - int(level * 4))),
        "Solarize": lambda: ImageOps.solarize(given_image, 256 - min(256, int(level * 256))),
        "SolarizeAdd": lambda: given_image.point(
            [min(255, value + min(128, int(level * 110))) if value < 128 else value for value in range(256)] * channels
        ),
        "Color": lambda: ImageEnhance.Color(given_image).enhance(factor),
        "Contrast": lambda: ImageEnhance.Contrast(given_image).enhance(factor),
        "Brightness": lambda: ImageEnhance.Brightness(given_image).enhance(factor),
        "Sharpness": lambda: ImageEnhance.Sharpness(given_image).enhance(factor),
        "ShearX": lambda: affine(1, sign * 0.3 * level, 0, 0, 1, 0),
        "ShearY": lambda: affine(1, 0, 0, sign * 0.3 * level, 1, 0),
        "TranslateX": lambda: affine(1, 0, sign * 0.45 * level * width, 0, 1, 0),
        "TranslateY": lambda: affine(1, 0, 0, 0, 1, sign * 0.45 * level * height),
    }[name]()
    return np.asarray(made).reshape(image.shape)


@pytest.mark.parametrize("name", TONES)
@settings(max_examples=60)
@given(images(), st.floats(0, 1), st.sampled_from([-1, 1]))
def test_where_no_pixel_moves_it_is_pillow_to_the_last_bit(
    name: str, image: np.ndarray, level: float, sign: int
) -> None:
    before = image.copy()
    got = OPERATIONS[name](image, sign * level, FILL[: image.shape[2]])
    assert (got.shape, got.dtype) == (image.shape, np.uint8)
    np.testing.assert_array_equal(got, pillow(name, image, level, sign))
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("name", ["Color", "Contrast", "Equalize", "AutoContrast"])
def test_every_value_of_a_large_image_is_pillow_too(name: str) -> None:
    """What depends on sums over the image, on 120,000 pixels."""
    image = np.random.default_rng(5).integers(0, 256, (300, 400, 3), dtype=np.uint8) // np.uint8(2)
    np.testing.assert_array_equal(OPERATIONS[name](image, 0.7, FILL), pillow(name, image, 0.7, 1))


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("shape", [(32, 32, 3), (40, 64, 1), (64, 40, 3)])
@pytest.mark.parametrize("sign", [-1, 1])
def test_moved_pixels_are_where_pillow_puts_them(name: str, shape: tuple[int, int, int], sign: int) -> None:
    """The two cubic kernels differ; 3 of 255 is far less than a quarter of a pixel's move makes."""
    image = smooth(*shape)
    for level in (0.0, 0.31, 0.87, 1.0):
        got = OPERATIONS[name](image, sign * level, FILL[: shape[2]]).astype(int)
        difference = np.abs(got - pillow(name, image, level, sign))
        assert difference.max() <= 3, (level, difference.max())
        assert difference.mean() < 0.8
    elsewhere = OPERATIONS[name](image, sign * 0.89, FILL[: shape[2]]).astype(int)
    assert np.abs(elsewhere - pillow(name, image, 0.87, sign)).max() > 6


@pytest.mark.parametrize("name", MOVES)
@settings(max_examples=40)
@given(images(), st.floats(0, 0.99), st.sampled_from([-1, 1]))  # at 1 pixels lie on the very border: 30 degrees
def test_moving_noise_fills_the_same_pixels(name: str, image: np.ndarray, level: float, sign: int) -> None:
    """At worst the kernels are 42 of 255 apart, 16 where pixels move one way only; which ones are filled is exact."""
    channels = image.shape[2]
    got = OPERATIONS[name](image, sign * level, FILL[:channels])
    assert (got.shape, got.dtype) == (image.shape, np.uint8)
    assert np.abs(got.astype(int) - pillow(name, image, level, sign)).max() <= (44 if name == "Rotate" else 18)
    black = np.zeros_like(image)
    np.testing.assert_array_equal(
        OPERATIONS[name](black, sign * level, FILL[:channels]), pillow(name, black, level, sign)
    )


def test_grey_has_no_colour_to_change() -> None:
    image = smooth(16, 24, 1)
    assert OPERATIONS["Color"](image, 1.0, (0,)) is image


def test_all_of_timms_operations_are_there() -> None:
    """`rand-…-inc1`'s fifteen; "increasing" ones do nothing at level 0 (but AutoContrast and its like)."""
    assert len(OPERATIONS) == 15
    image = smooth(16, 24, 3)
    unchanged = [name for name, run in OPERATIONS.items() if np.array_equal(run(image, 0.0, FILL), image)]
    assert set(OPERATIONS) - set(unchanged) == {"AutoContrast", "Equalize", "Invert", "Posterize"}


def test_magnitudes_are_normal_and_clipped() -> None:
    uniforms = np.random.default_rng(0).random((200_000, 2))
    levels = RandAugment(2, 9.0, 0.5, FILL).levels(uniforms)
    assert np.median(levels) == pytest.approx(0.9, abs=0.001)
    below = [np.mean(levels < 0.9 - sigmas * 0.05) for sigmas in (1, 2)]
    assert below == pytest.approx([0.1587, 0.0228], abs=0.003)
    assert levels.max() == 1.0
    assert np.mean(levels == 1.0) == pytest.approx(0.0228, abs=0.003)
    extreme = np.array([[0.0, 0.0], [1 - 2**-53, 0.0], [1 - 2**-53, 0.5]])
    assert RandAugment(2, 1.0, 5.0, FILL).levels(extreme).tolist() == [0.1, 1.0, 0.0]
    assert (RandAugment(2, 9.0, 0.0, FILL).levels(uniforms) == 0.9).all()


def test_each_operation_comes_half_of_the_time_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts what is called for 6,000 images of two layers."""
    calls: list[tuple[int, int]] = []

    def spy(number: int) -> Any:
        def run(image: np.ndarray, level: float, fill: tuple[int, ...]) -> np.ndarray:
            assert fill == FILL
            calls.append((number, 1 if level > 0 else -1))
            return image

        return run

    monkeypatch.setattr(augment, "_OPERATIONS", tuple(spy(number) for number in range(len(OPERATIONS))))
    randaugment = RandAugment(2, 9.0, 0.5, FILL)
    uniforms = np.random.default_rng(1).random((6000, randaugment.num_uniforms))
    randaugment(np.zeros((6000, 1, 1, 3), np.uint8), uniforms)
    counts = np.zeros((len(OPERATIONS), 2))
    for number, sign in calls:
        counts[number, (sign + 1) // 2] += 1
    expected = 6000 * 2 * 0.5 / len(OPERATIONS) / 2  # 200
    assert np.abs(counts - expected).max() < 5 * math.sqrt(expected)


def test_layers_follow_one_another_and_rows_have_their_own() -> None:
    """Invert twice is the image again; another row's numbers touch only that row."""
    index = list(OPERATIONS).index("Invert")
    invert = [0.0, (index + 0.5) / len(OPERATIONS), 0.5, 0.5, 0.5]
    nothing = [0.9, *invert[1:]]
    assert len(invert) == UNIFORMS_PER_LAYER
    batch = np.stack([smooth(16, 8, 3)] * 3)
    got = RandAugment(2, 9.0, 0.5, FILL)(batch.copy(), np.array([invert + invert, nothing + invert, nothing + nothing]))
    np.testing.assert_array_equal(got, np.stack([batch[0], 255 - batch[1], batch[2]]))
