"""Image files of every kind: each decodes to the right pixels, or is refused by a message that says why."""

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

import mae_dist
from mae_dist.data.decode import Decoder, stored_dtype
from mae_dist.data.image_files import UndecodableImage, load_upright

RNG = np.random.default_rng(0)
HEIGHT, WIDTH = 20, 30
SMOOTH = np.rint(
    np.stack([np.add.outer(np.arange(HEIGHT) * a, np.arange(WIDTH) * b) for a, b in ((3, 4), (8, 1), (1, 6))], axis=-1)
).astype(np.uint8)  # of few details: what a lossy format keeps
NOISE = RNG.integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
TWELVE_BITS = (np.add.outer(np.arange(64), np.arange(64)) * 4095 // 126).astype(np.uint16)
TWELVE = TWELVE_BITS[..., None]
BANDS = RNG.integers(0, 10_000, (HEIGHT, WIDTH, 13), dtype=np.uint16)


def pillow(array: Any, kind: str, mode: str = "", **options: Any) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tiff(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **{"planarconfig": "contig", "photometric": "minisblack", **options})
    return file.getvalue()


def animated(kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    first, second = Image.fromarray(SMOOTH), Image.fromarray(255 - SMOOTH)
    first.save(file, kind, save_all=True, append_images=[second], **options)
    return file.getvalue()


def zeroed_jpeg() -> bytes:
    data = bytearray(pillow(SMOOTH, "JPEG"))
    data[len(data) // 2 - 32 : len(data) // 2 + 32] = bytes(64)
    return bytes(data)


def over(background: float) -> np.ndarray:
    """RGBA noise over a plain colour, in floating point."""
    alpha = NOISE[..., 3:] / 255
    return NOISE[..., :3] * alpha + 255 * background * (1 - alpha)


GRAY = 0.299 * SMOOTH[..., :1] + 0.587 * SMOOTH[..., 1:2] + 0.114 * SMOOTH[..., 2:]
PALETTE = Image.fromarray(SMOOTH).convert("P")
SIX = BANDS[..., :6]
FRACTIONS = RNG.random((HEIGHT, WIDTH, 3), np.float32)

# name -> file, decoder, right values, largest difference allowed
RIGHT: dict[str, tuple[bytes, Decoder, np.ndarray, float]] = {
    "gray JPEG": (pillow(SMOOTH[..., 0], "JPEG", quality=100), Decoder(3), SMOOTH[..., [0, 0, 0]], 2),
    "progressive JPEG": (pillow(SMOOTH, "JPEG", quality=98, progressive=True, subsampling=0), Decoder(3), SMOOTH, 4),
    "colours as gray": (pillow(SMOOTH, "PNG"), Decoder(1), GRAY, 1),
    "phone's MPO": (animated("MPO", quality=98, subsampling=0), Decoder(3), SMOOTH, 4),
    "palette PNG": (
        pillow(np.asarray(PALETTE.convert("RGB")), "PNG"),
        Decoder(3),
        np.asarray(PALETTE.convert("RGB")),
        0,
    ),
    "transparent PNG over white": (pillow(NOISE, "PNG"), Decoder(3, background=1.0), over(1.0), 1),
    "transparent PNG over black": (pillow(NOISE, "PNG"), Decoder(3, background=0.0), over(0.0), 1),
    "transparent WebP": (pillow(NOISE, "WEBP", lossless=True, exact=True), Decoder(3, background=1.0), over(1.0), 1),
    "gray and alpha": (
        pillow(NOISE[..., [0, 3]], "PNG"),
        Decoder(1, background=0.0),
        NOISE[..., :1] * (NOISE[..., 3:] / 255),
        1.5,
    ),
    "RGBA kept": (pillow(NOISE, "PNG"), Decoder(4, background=1.0), NOISE, 0),
    "1-bit PNG": (pillow(SMOOTH[..., 0] // 128 * 255, "PNG", "1"), Decoder(1), SMOOTH[..., :1] // 128 * 255, 0),
    "1 x 1": (pillow(SMOOTH[:1, :1], "PNG"), Decoder(3), SMOOTH[:1, :1], 0),
    "3000 x 1": (pillow(np.zeros((1, 3000, 3), np.uint8), "PNG"), Decoder(3), np.zeros((1, 3000, 3)), 0),
    "BMP": (pillow(SMOOTH, "BMP"), Decoder(3, background=1.0), SMOOTH, 0),
    "animated GIF": (animated("GIF"), Decoder(3, background=1.0), SMOOTH, 60),  # its first frame, in 256 colours
    "animated WebP": (animated("WEBP", lossless=True), Decoder(3, background=1.0), SMOOTH, 0),
    "AVIF": (pillow(SMOOTH, "AVIF", quality=98, subsampling="4:4:4"), Decoder(3, background=1.0), SMOOTH, 6),
    "JPEG 2000": (pillow(SMOOTH, "JPEG2000", irreversible=False), Decoder(3, background=1.0), SMOOTH, 0),
    "LZW TIFF": (pillow(SMOOTH, "TIFF", compression="tiff_lzw"), Decoder(3, background=1.0), SMOOTH, 0),
    "CMYK TIFF": (pillow(SMOOTH, "TIFF", "CMYK"), Decoder(3, background=1.0), SMOOTH, 2),
    "12 bits": (pillow(TWELVE_BITS, "PNG"), Decoder(1, "uint16", 4095.0), TWELVE, 0),
    "12 bits as fractions": (
        pillow(TWELVE_BITS, "PNG"),
        Decoder(1, "float32", 4095.0),
        TWELVE_BITS[..., None] / 4095,
        1e-6,
    ),
    "16 bits as 8": (pillow(TWELVE_BITS, "PNG"), Decoder(1, "uint8", 4095.0), TWELVE / 4095 * 255, 0.5),
    "8 bits as 12": (pillow(SMOOTH, "PNG"), Decoder(3, "uint16", 4095.0), SMOOTH / 255 * 4095, 0.5),
    "float32 TIFF": (tiff(FRACTIONS, photometric="rgb"), Decoder(3, "float32"), FRACTIONS, 0),
    "float64 .npy": (npy(FRACTIONS.astype(float) * 50), Decoder(3, "float32", 50.0), FRACTIONS, 1e-6),
    "six bands": (
        tiff(SIX),
        Decoder(6, "uint16"),
        SIX,
        0,
    ),
    "six planes": (
        tiff(np.moveaxis(SIX, -1, 0), planarconfig="separate"),
        Decoder(6, "uint16"),
        SIX,
        0,
    ),
    "six images": (
        tiff(np.moveaxis(SIX, -1, 0), planarconfig=None),
        Decoder(6, "uint16"),
        SIX,
        0,
    ),
    "deflated bands": (
        tiff(BANDS, compression="zlib"),
        Decoder(13, "uint16"),
        BANDS,
        0,
    ),
    "four bands that are no alpha": (
        tiff(BANDS[..., :4]),
        Decoder(4, "uint16"),
        BANDS[..., :4],
        0,
    ),
    "bands in .npy": (npy(BANDS), Decoder(13, "uint16"), BANDS, 0),
    "bands first in .npy": (npy(np.moveaxis(BANDS, -1, 0)), Decoder(13, "uint16"), BANDS, 0),
    "JPEG with zeroed bytes": (zeroed_jpeg(), Decoder(3), SMOOTH, 255),  # grey blocks: no decoder calls it a fault
}


@pytest.mark.parametrize("name", list(RIGHT))
def test_right_pixels(name: str) -> None:
    data, decoder, expected, tolerance = RIGHT[name]
    image = decoder.decode(data)
    assert image.shape == expected.shape
    assert image.dtype == decoder.dtype
    np.testing.assert_allclose(image.astype(float), expected.astype(float), atol=tolerance, rtol=0)
    assert decoder.header(data)[:2] == expected.shape[:2]
    out = np.empty_like(image)
    decoder.decode_box(data, decoder.header(data), (0, 0, *image.shape[:2]), out)
    np.testing.assert_array_equal(out, image)


def test_twelve_bits_keep_their_levels() -> None:
    image = Decoder(1, "uint16", 4095.0).decode(pillow(TWELVE_BITS, "PNG"))
    assert len(np.unique(image)) == len(np.unique(TWELVE_BITS)) == 127


REFUSED: dict[str, tuple[Callable[[], bytes], Decoder, str]] = {
    "no image": (lambda: b"hello", Decoder(3), "not a whole image"),
    "cut PNG": (lambda: pillow(NOISE, "PNG")[:100], Decoder(3, background=1.0), "not a whole image"),
    "cut .npy": (lambda: npy(BANDS)[:500], Decoder(13, "uint16"), "no whole .npy file"),
    "pickled .npy": (lambda: npy(np.array([[{}]])), Decoder(1), "no whole .npy file"),
    "cut TIFF": (
        lambda: tiff(BANDS)[:300],
        Decoder(13, "uint16"),
        "TIFF",
    ),
    "six bands as RGB": (
        lambda: tiff(SIX),
        Decoder(3),
        "6 channels where 3 are asked for",
    ),
    "four bands as RGB": (
        lambda: tiff(BANDS[..., :4]),
        Decoder(3, "uint16", background=1.0),
        "4 channels where 3 are asked for",
    ),
    "RGB as RGBA": (lambda: pillow(SMOOTH, "PNG"), Decoder(4), "3 channels where 4 are asked for"),
    "a stack of images": (
        lambda: tiff(BANDS[..., 0][None].repeat(5, 0), planarconfig=None),
        Decoder(3),
        "5 images of one size",
    ),
    "whole numbers of 32 bits": (lambda: npy(BANDS.astype(np.int32)), Decoder(13), "values of type int32"),
    "not a number": (lambda: npy(np.full((4, 4), np.nan)), Decoder(1, "float32"), "not finite"),
    "16 bits among 8": (
        lambda: pillow(TWELVE_BITS, "PNG"),
        Decoder(1, background=1.0, deeper=False),
        "uint16 in a set of uint8; set data.dtype='uint16'",
    ),
    "one dimension": (lambda: npy(np.zeros(9, np.uint8)), Decoder(1), "an array of shape"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refusals_say_why(name: str) -> None:
    make, decoder, message = REFUSED[name]
    with pytest.raises(UndecodableImage, match=message):
        decoder.decode(make())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(orientation: int) -> None:
    """As Pillow turns them, and the crop of a photograph that is decoded at a fraction of its size, too."""
    smooth = cv2.resize(SMOOTH, (600, 400), interpolation=cv2.INTER_LINEAR)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = pillow(smooth, "JPEG", quality=98, subsampling=0, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        from PIL import ImageOps

        upright = np.asarray(ImageOps.exif_transpose(image))
    decoder = Decoder(3, exif=True)
    np.testing.assert_allclose(decoder.decode(data).astype(int), upright.astype(int), atol=3)
    header = decoder.header(data)
    assert header[:2] == upright.shape[:2]
    assert Decoder(3).header(data)[:2] == (400, 600)
    out = np.empty((100, 100, 3), np.uint8)
    decoder.decode_box(data, header, (0, 0, 400, 400), out)
    expected = cv2.resize(upright[:400, :400], (100, 100), interpolation=cv2.INTER_AREA)
    assert np.abs(out.astype(int) - expected.astype(int)).mean() < 4


@pytest.mark.parametrize(
    ("data", "channels", "dtype"),
    [
        (pillow(TWELVE_BITS, "PNG"), 1, "uint16"),
        (pillow(SMOOTH, "PNG"), 3, "uint8"),
        (pillow(SMOOTH, "JPEG"), 3, "uint8"),
        (tiff(FRACTIONS, photometric="rgb"), 3, "float32"),
        (npy(BANDS), 13, "uint16"),
        (b"nothing", 3, None),
    ],
)
def test_the_type_of_what_is_stored(data: bytes, channels: int, dtype: str | None) -> None:
    assert stored_dtype(data, Decoder(channels)) == dtype


def claims(width: int, height: int) -> dict[str, bytes]:
    """Small files whose headers say that they hold images of this size."""
    header = struct.pack(">4sIIBBBBB", b"IHDR", width, height, 8, 2, 0, 0, 0)
    end = struct.pack(">I", zlib.crc32(header)) + struct.pack(">I4s", 4, b"IDAT") + bytes(8)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + end
    jpeg = bytearray(pillow(SMOOTH, "JPEG"))
    place = jpeg.index(b"\xff\xc0") + 5
    jpeg[place : place + 4] = struct.pack(">HH", height, width)
    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": (height, width)})
    return {"PNG": png, "JPEG": bytes(jpeg), "npy": array.getvalue()}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "npy"])
@pytest.mark.parametrize("side", [13_500, 30_000])  # of the second, Pillow does not read the header
def test_a_small_file_that_holds_gigabytes(kind: str, side: int) -> None:
    """Refused by its header: nothing of that size is allocated."""
    data, decoder = claims(side, side)[kind], Decoder(3)
    assert decoder.header(data) == (0, 0, 1)
    message = "no whole .npy file" if kind == "npy" else "data.max_pixels"
    tracemalloc.start()
    with pytest.raises(UndecodableImage, match=message):
        decoder.decode(data)
    with pytest.raises(UndecodableImage, match=message):
        load_upright(data)
    assert tracemalloc.get_traced_memory()[1] < side * side / 10
    tracemalloc.stop()


@pytest.mark.parametrize(
    "data",
    [
        pillow(SMOOTH, "PNG"),
        pillow(SMOOTH, "WEBP"),
        npy(SMOOTH),
        tiff(SMOOTH, photometric="rgb"),
        pillow(SMOOTH, "TIFF", compression="tiff_lzw"),
        tiff(np.moveaxis(SMOOTH, -1, 0), planarconfig=None),  # three images
    ],
)
def test_the_limit_of_pixels(data: bytes) -> None:
    assert mae_dist.default_config().data.max_pixels == Decoder(3).max_pixels
    assert Decoder(3, max_pixels=HEIGHT * WIDTH).decode(data).shape == SMOOTH.shape
    for exif in (False, True):
        decoder = Decoder(3, exif=exif, max_pixels=HEIGHT * WIDTH - 1)
        with pytest.raises(UndecodableImage, match="20 x 30 pixels, more than 599: shrink it, or raise"):
            decoder.decode(data)
        assert decoder.header(data) == (0, 0, 1)
    with pytest.raises(UndecodableImage, match="more than 599"):
        load_upright(data, HEIGHT * WIDTH - 1)
    assert data.startswith(b"\x89PNG") or stored_dtype(data, decoder) is None
