"""Bicubic resampling, antialiased along each axis by itself: the pixels of Pillow's `Image.resize`, in half the time.

Where an axis shrinks, the kernel (Keys 1981, a = -1/2) is as much wider; where it grows, the kernel is itself. As in
Pillow, the width is resampled first, and the result of integers rounded before the height is. Both are matmuls: the
rows of weights are nearly all zero, so a matmul computes a few neighbouring rows of the result from the rows of the
image that these need.

Legend: H, W size of the image, H', W' of the result, C channels, n a length along one axis, N values beside each other.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

_REACH = 2.0  # of the kernel to either side, in pixels of the result or of the image, whichever are larger
# OpenBLAS computes a matmul of no more multiplications than this in the thread that calls it. For larger ones it wakes
# threads of its own, which would fight XLA and the other readers for the cores.
_MATMUL_SIZE = 2**18
_CALL_COST = 2**16  # multiplications in the time that it takes to call a matmul
_CHUNK = 2**18 - 2**12  # values that are computed at once: just below the MiB from which a reader maps memory anew

# (top, left, height, width) in pixels; whole numbers or fractions.
Box = Sequence[float]


class _Rows(NamedTuple):
    """Neighbouring rows of the result, from `first` on: weights @ image rows start .. stop - 1."""

    first: int
    start: int
    stop: int
    weights: np.ndarray  # float32 (rows, stop - start)


def resize_box(image: np.ndarray, box: Box, out: np.ndarray, *, margin: bool = False) -> None:
    """Resizes `box` of an image into `out`. # (H, W, C) -> out (H', W', C) of the same type, C-contiguous

    Args:
      image: where the box is cut from.
      box: its edges may lie within pixels.
      out: the result.
      margin: pixels around the box count where the kernel reaches beyond its edge, as if the whole image were resized
        and then cropped. Otherwise the box is cropped first, to the whole pixels that it touches.
    """
    height, width, channels = out.shape
    top, left, box_height, box_width = box
    rows = _needed(top, box_height, image.shape[0], height, margin)
    columns = _needed(left, box_width, image.shape[1], width, margin)
    cut = image[rows, columns]
    num_rows, num_columns = cut.shape[:2]
    if (box_height, box_width, num_rows, num_columns) == (height, width, height, width):
        out[...] = cut
        return
    turned = _transpose(cut).reshape(num_columns, num_rows * channels)
    narrow = np.empty((width, num_rows * channels), image.dtype)
    _resample(turned, left - columns.start, box_width, narrow)
    upright = _transpose(narrow.reshape(width, num_rows, channels)).reshape(num_rows, width * channels)
    _resample(upright, top - rows.start, box_height, out.reshape(height, width * channels))


def resize_boxes(images: np.ndarray, boxes: np.ndarray, out: np.ndarray) -> None:
    """Resizes a box of each image: as `resize_box` to the last bit, at twice its speed where images are small.

    Boxes of one width are resampled together, then those of one height: for 32 pixels a call costs more than its work.

    Args:
      images: uint8, uint16 or float32. # (N, H, W, C)
      boxes: whole numbers. # (N, 4)
      out: the results, of the same type. # (N, H', W', C)
    """
    _, height, width, channels = out.shape
    narrow: list[np.ndarray] = [out] * len(out)  # of each image, turned: (W', box height * C)
    for box_width in np.unique(boxes[:, 3]).tolist():
        rows = np.flatnonzero(boxes[:, 3] == box_width)
        parts = []
        for row, (top, left, box_height, _) in zip(rows.tolist(), boxes[rows].tolist(), strict=True):
            cut = images[row, top : top + box_height, left : left + box_width]
            parts.append(_transpose(cut).reshape(box_width, box_height * channels))
        turned = np.concatenate(parts, axis=1)
        result = np.empty((width, turned.shape[1]), out.dtype)
        _resample(turned, 0, box_width, result)
        ends = np.cumsum([part.shape[1] for part in parts]).tolist()
        for row, part, end in zip(rows.tolist(), parts, ends, strict=True):
            narrow[row] = result[:, end - part.shape[1] : end]
    for box_height in np.unique(boxes[:, 2]).tolist():
        rows = np.flatnonzero(boxes[:, 2] == box_height)
        upright = [_transpose(narrow[row].reshape(width, box_height, channels)) for row in rows.tolist()]
        stacked = np.concatenate([part.reshape(box_height, width * channels) for part in upright], axis=1)
        result = np.empty((height, stacked.shape[1]), out.dtype)
        _resample(stacked, 0, box_height, result)
        out[rows] = result.reshape(height, len(rows), width, channels).swapaxes(0, 1)


def _needed(start: float, length: float, size: int, out: int, margin: bool) -> slice:
    """Returns the pixels along an axis of `size` that are resampled to `out`."""
    beyond = _REACH * max(1.0, length / out) if margin else 0.0
    return slice(max(0, math.floor(start - beyond)), min(size, math.ceil(start + length + beyond)))


def _resample(image: np.ndarray, start: float, length: float, out: np.ndarray) -> None:
    """Resamples start .. start + length of the first axis. # (n, N) -> out (n', N)"""
    chunk = min(image.shape[1], max(1, _CHUNK // max(len(image), len(out))))
    # More rows in a matmul are more weights that are zero, fewer are more calls.
    cost_of_row = chunk * max(1.0, length / len(out))
    rows = 2 ** max(1, round(math.log2(_CALL_COST / cost_of_row) / 2))
    blocks = _weights(start, length, len(image), len(out), rows)
    chunk = min(chunk, max(1, _MATMUL_SIZE // blocks[0].weights.size))
    for left in range(0, image.shape[1], chunk):
        source = image[:, left : left + chunk].astype(np.float32)
        result = np.empty((len(out), source.shape[1]), np.float32)
        for first, low, high, weights in blocks:
            np.matmul(weights, source[low:high], out=result[first : first + rows])
        if out.dtype == np.uint8:
            np.maximum(result, 0, out=result)  # the conversion takes the absolute value
            cv2.convertScaleAbs(result, dst=out[:, left : left + chunk])
        elif out.dtype == np.uint16:
            out[:, left : left + chunk] = np.rint(np.clip(result, 0, 65535))
        else:
            out[:, left : left + chunk] = result


def _transpose(image: np.ndarray) -> np.ndarray:
    """Swaps the first two axes. # (H, W, C) -> (W, H, C), C-contiguous"""
    if image.dtype == np.uint8 and image.shape[-1] in (1, 3, 4):
        return cv2.transpose(image)
    return np.ascontiguousarray(image.swapaxes(0, 1))


@functools.lru_cache(512)  # crops of photographs have a few hundred lengths
def _weights(start: float, length: float, size: int, out: int, at_once: int) -> list[_Rows]:
    """Returns the weights of `out` results from start .. start + length of `size` pixels, `at_once` in a matmul."""
    scale = length / out
    widen = max(1.0, scale)
    centers = start + (np.arange(out) + 0.5) * scale  # (n',), from the corner of the first pixel
    # Pixels whose centres are in the kernel's reach.
    lowest = np.maximum(np.trunc(centers - _REACH * widen + 0.5), 0)
    beyond = np.minimum(np.trunc(centers + _REACH * widen + 0.5), size)
    firsts = np.arange(0, out, at_once)
    lasts = np.minimum(firsts + at_once, out) - 1
    span = int((beyond[lasts] - lowest[firsts]).max())  # one for all, so that the matmuls are of one size
    starts = np.minimum(lowest[firsts], size - span).astype(int)
    pixels = np.repeat(starts, at_once)[:out, None] + np.arange(span)  # (n', span)
    x = np.abs(pixels + 0.5 - centers[:, None]) / widen
    kernel = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
    kernel *= (pixels >= lowest[:, None]) & (pixels < beyond[:, None])
    weights = (kernel / kernel.sum(axis=1, keepdims=True)).astype(np.float32)
    return [
        _Rows(first, low, low + span, weights[first : first + at_once])
        for first, low in zip(firsts.tolist(), starts.tolist(), strict=True)
    ]
