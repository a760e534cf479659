"""The fast path: the crop is drawn first, only its box is decoded, and uint8 arrays are resized and augmented.

Decoding and RandAugment give the bits of the exact path. The resize is the same antialiased filter, rounded otherwise.
Bilinear: torch's on uint8, or OpenCV's INTER_LINEAR where no side shrinks and there is nothing to antialias. So before
RandAugment values are a level off at most, but for one in millions (tools/bench_decode.py). Bicubic: torch's, whose
values are a level off at most, but for a few in a million that are two (tests/test_fast_path.py); OpenCV's INTER_CUBIC
is another filter (a = -0.75, where Pillow and torch have -0.5).

Shapes: S side of a square image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.augment.choices import Choices, Interpolation
from shards.crop import decode_box


@dataclass(frozen=True)
class FastTrainTransform(Choices):
    """What `pipeline.augment.exact.TrainTransform` does, with the same choices for the same draws."""

    def __call__(self, data: bytes, draws: np.ndarray) -> NDArray[np.uint8]:
        """Encoded image and draws float64 [num_draws] in [0, 1) -> uint8 [S, S, 3]. ValueError as the exact path."""
        pixels, _ = decode_box(data, lambda height, width: self.crop(draws, height, width))
        pixels = resize(pixels, self.image_size, self.interpolation)
        if self.flips(draws):
            pixels = np.asarray(cv2.flip(pixels, 1), np.uint8)
        return self.randaugment.on_pixels(pixels, self.of_randaugment(draws))


def resize(pixels: NDArray[np.uint8], side: int, interpolation: Interpolation = "bilinear") -> NDArray[np.uint8]:
    """uint8 [H, W, 3] -> [side, side, 3] by the filter that Pillow has under that name, but for rounding."""
    return RESIZES[interpolation](pixels, side)


def _bilinear(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    height, width, _ = pixels.shape
    if max(height, width) <= side:
        return np.asarray(cv2.resize(pixels, (side, side), interpolation=cv2.INTER_LINEAR), np.uint8)
    return _resample(torch.ops.aten._upsample_bilinear2d_aa, pixels, side, side)


def _bicubic(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """What the cubic overshoots by is cut off between the two passes, so their order is felt: Pillow begins with the
    height where it shrinks by over twice as many pixels as the width (since 13: its pull request 9549), torch never."""
    height, width, _ = pixels.shape
    if height > side and height - side > 2 * (width - side):
        pixels = _resample(torch.ops.aten._upsample_bicubic2d_aa, pixels, side, width)
    return _resample(torch.ops.aten._upsample_bicubic2d_aa, pixels, side, side)


def _resample(operator: Any, pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] -> [height, width, 3]."""
    resized = torch.empty(1, height, width, 3, dtype=torch.uint8)  # else torch makes it [3, H, W], in twice the time
    operator.out(
        torch.from_numpy(pixels).unsqueeze(0).permute(0, 3, 1, 2),
        [height, width],
        False,  # align_corners
        out=resized.permute(0, 3, 1, 2),
    )
    return resized[0].numpy()


RESIZES: dict[str, Callable[[NDArray[np.uint8], int], NDArray[np.uint8]]] = {
    "bilinear": _bilinear,
    "bicubic": _bicubic,
}
