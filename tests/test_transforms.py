"""Decoding, crop boxes that stay inside their images, and flips."""

import io
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mae_dist.data.decode import Decoder
from mae_dist.data.image_files import UndecodableImage
from mae_dist.data.resample import resize_box
from mae_dist.data.transforms import (
    CROP_UNIFORMS,
    RandomCrops,
    center_box,
    crop_images,
    flip_images,
    resize_images,
)
from tests.test_resample import pillows

SIDES = st.integers(1, 700)


def decode_box(channels: int, data: bytes, box: Any, out: np.ndarray, *, margin: bool = False) -> None:
    decoder = Decoder(channels)
    decoder.decode_box(data, decoder.header(data), box, out, margin=margin)


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
    np.testing.assert_array_equal(Decoder(channels).decode(data), image)


@pytest.mark.parametrize("extension", [".jpg", ".png"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.9])
def test_cut_files_do_not_decode(extension: str, kept: float) -> None:
    data = cv2.imencode(extension, _gradient(64, 64))[1].tobytes()
    with pytest.raises(UndecodableImage):
        Decoder(3).decode(data[: int(kept * len(data))])


def _photograph(height: int, width: int) -> Image.Image:
    """Noise whose spectrum falls with the frequency, mostly grey, and an edge: like a photograph, to a resampler."""
    rng = np.random.default_rng(0)
    y, x = np.fft.fftfreq(height)[:, None, None], np.fft.fftfreq(width)[None, :, None]
    white = rng.standard_normal((height, width, 1)) + 0.2 * rng.standard_normal((height, width, 3))
    spectrum = np.fft.fft2(white, axes=(0, 1)) / (np.hypot(x, y) + 1e-3) ** 1.4
    image = np.fft.ifft2(spectrum, axes=(0, 1)).real
    image = 128 + 45 * image / image.std()
    image[height // 3 : height // 2, width // 4 : width // 2] += 60
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def _file(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _cmyk(image: Image.Image) -> Image.Image:
    """The image in the colours of print, with some black."""
    planes = np.array(image.convert("CMYK"))
    planes[..., 3] = planes[..., :3].min(axis=-1) // 2
    planes[..., :3] -= planes[..., 3:]
    return Image.fromarray(planes, mode="CMYK")


def _with_exif(data: bytes, content: bytes) -> bytes:
    """A JPEG file with one more segment before all others."""
    content = b"Exif\0\0" + content
    return data[:2] + b"\xff\xe1" + (len(content) + 2).to_bytes(2, "big") + content + data[2:]


_PHOTOGRAPH = _photograph(90, 120)
_LYING = Image.Exif()
_LYING[0x112] = 6  # orientation: turned by a quarter
_ODD = {
    "grey": _file(_PHOTOGRAPH.convert("L")),
    "progressive": _file(_PHOTOGRAPH, progressive=True),
    "CMYK": _file(_cmyk(_PHOTOGRAPH)),
    "PNG": _file(_PHOTOGRAPH, "PNG"),
    "PNG with a palette": _file(_PHOTOGRAPH.convert("P"), "PNG", transparency=3),
    "PNG, grey with alpha": _file(_PHOTOGRAPH.convert("LA"), "PNG"),
    "BMP": _file(_PHOTOGRAPH, "BMP"),
    "WebP": _file(_PHOTOGRAPH, "WEBP", lossless=True),
    "EXIF garbage": _with_exif(_file(_PHOTOGRAPH), bytes(range(256))),
    "EXIF thumbnail": _with_exif(_file(_PHOTOGRAPH), _file(_PHOTOGRAPH.resize((16, 12)))),
    "EXIF orientation": _file(_PHOTOGRAPH, exif=_LYING),
    "more behind it": _file(_PHOTOGRAPH) + bytes(range(256)),
}


@pytest.mark.parametrize("name", _ODD)
def test_odd_files_have_pillows_colours(name: str) -> None:
    data = _ODD[name]
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert Decoder(3).header(data)[:2] == expected.shape[:2]
    # Both round the conversion from CMYK, and differently.
    assert np.abs(Decoder(3).decode(data) - expected).max() <= (2 if name == "CMYK" else 0)
    half = expected.reshape(45, 2, 60, 2, 3).mean(axis=(1, 3))
    if data.startswith(b"\xff\xd8"):
        assert np.abs(Decoder(3).decode(data, reduction=2) - half).mean() < 3


@given(st.sampled_from(sorted(_ODD)), st.integers(0, 400), st.binary(max_size=4))
def test_a_corrupted_header_tells_a_size_or_none(name: str, position: int, corruption: bytes) -> None:
    data = _ODD[name][:position]
    for content in (data, data + corruption, data + corruption + _ODD[name][position + len(corruption) :]):
        size = Decoder(3).header(content)[:2]
        assert size == (0, 0) or min(size) > 0


# Decoded at its size and in colour, a crop is Pillow's but for where two roundings differ. libjpeg converts to grey by
# itself; decoding at half the size, which a factor of 2 and more allows, is another smoothing.
@pytest.mark.parametrize(
    ("box", "bound"),
    [
        ((10, 20, 180, 150), 0.005),  # grows
        ((10, 20, 250, 190), 0.005),  # grows in width, shrinks in height
        ((10, 20, 250, 300), 0.005),
        ((31, 47, 400, 390), 0.005),
        ((0, 0, 480, 444), 0.005),
        ((4, 6, 590, 700), 1.5),  # decoded at half its size
        ((5, 3, 595, 450), 1.5),  # its edges are half pixels then
    ],
)
def test_a_crop_of_a_photograph_is_what_pillow_makes_of_it(box: tuple[int, int, int, int], bound: float) -> None:
    data = _file(_photograph(600, 720), quality=92)
    top, left, height, width = box
    crop = Image.open(io.BytesIO(data)).crop((left, top, left + width, top + height))
    out = np.zeros((224, 224, 3), np.uint8)
    decode_box(3, data, box, out)
    assert np.abs(out - pillows(crop, (224, 224))).mean() < bound
    grey = np.zeros((224, 224, 1), np.uint8)
    decode_box(1, data, box, grey)
    assert np.abs(grey[..., 0] - pillows(crop.convert("L"), (224, 224))).mean() < bound + 0.1


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (301, 300), (256, 256), (447, 611), (100, 90)])
@pytest.mark.parametrize(("side", "zoom"), [(224, 256 / 224), (224, 1.0), (96, 256 / 224), (32, 1.0)])
def test_evaluation_sees_what_torchvisions_resize_and_center_crop_leave(
    size: tuple[int, int], side: int, zoom: float
) -> None:
    """Resize(short side), whose long side is rounded down, then CenterCrop; Pillow resizes one axis after the other."""
    image = _photograph(*size)
    short = round(zoom * side)
    height, width = (short * edge // min(size) for edge in size)
    top, left = round((height - side) / 2), round((width - side) / 2)
    expected = pillows(image, (height, width))[top : top + side, left : left + side]
    out = np.zeros((side, side, 3), np.uint8)
    resize_box(np.asarray(image), center_box(*size, (side, side), zoom), out, margin=True)
    assert np.abs(out - expected).mean() < 0.005
    assert np.abs(out - expected).max() <= 2
    decode_box(3, _file(image, "PNG"), center_box(*size, (side, side), zoom), out, margin=True)
    assert np.abs(out - expected).max() <= 2


def test_an_rgb_image_has_no_alpha_channel() -> None:
    data = cv2.imencode(".png", _gradient(8, 8))[1].tobytes()
    with pytest.raises(UndecodableImage, match="where 4 are asked"):
        Decoder(4).decode(data)


@given(SIDES, SIDES, SIDES, SIDES, st.floats(1, 2))
def test_center_box_is_inside_and_central(height: int, width: int, to_height: int, to_width: int, zoom: float) -> None:
    top, left, box_height, box_width = center_box(height, width, (to_height, to_width), zoom)
    assert box_height > 0
    assert box_width > 0
    # Within a pixel of the resized image, of which the crop is whole pixels.
    assert -1e-9 <= top <= height - box_height + 1e-9
    assert abs(top - (height - box_height) / 2) <= box_height / to_height / 2 + 1e-9
    assert -1e-9 <= left <= width - box_width + 1e-9
    assert abs(left - (width - box_width) / 2) <= box_width / to_width / 2 + 1e-9
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
    boxes = RandomCrops(uniforms, scale, ratio).boxes(heights, widths)
    top, left, box_heights, box_widths = boxes.T
    assert (box_heights >= 1).all()
    assert (box_widths >= 1).all()
    assert ((top >= 0) & (top + box_heights <= heights)).all()
    assert ((left >= 0) & (left + box_widths <= widths)).all()


def test_random_crops_have_the_area_and_aspect_asked_for() -> None:
    count, side = 4000, 500
    uniforms = np.random.default_rng(0).random((count, CROP_UNIFORMS))
    sides = np.full(count, side)
    top, left, heights, widths = RandomCrops(uniforms, (0.2, 1.0), (3 / 4, 4 / 3)).boxes(sides, sides).T
    area, aspect = heights * widths / side**2, widths / heights
    assert area.min() >= 0.199
    assert area.max() <= 1
    assert aspect.min() >= 0.745
    assert aspect.max() <= 1.342
    assert abs(np.log(aspect).mean()) < 0.02  # wide and tall alike
    assert abs((top - (side - heights - top)).mean()) < 5  # centred on average
    assert abs((left - (side - widths - left)).mean()) < 5


def test_a_crop_that_never_fits_falls_back_to_the_centre() -> None:
    crops = RandomCrops(np.full((1, CROP_UNIFORMS), 0.5), (0.9, 1), (0.75, 1.33))
    assert crops.boxes(np.array([10]), np.array([1000])).tolist() == [[0, 493, 10, 13]]


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
