"""The fast path: the crop is drawn first, only its box is decoded, and uint8 arrays are resized and augmented.

Decoding and RandAugment give the bits of the exact path. The resize is the same antialiased triangle filter, rounded
otherwise: torch's on uint8, or OpenCV's INTER_LINEAR where no side shrinks and there is nothing to antialias. So before
RandAugment values are a level off at most, but for one in millions (tools/bench_decode.py).

Shapes: S side of a square image.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.augment import randaugment
from pipeline.augment.choices import Choices
from shards.crop import decode_box


@dataclass(frozen=True)
class FastTrainTransform(Choices):
    """What `pipeline.augment.exact.TrainTransform` does, with the same choices for the same draws."""

    def __call__(self, data: bytes, draws: np.ndarray) -> NDArray[np.uint8]:
        """Encoded image and draws float64 [num_draws] in [0, 1) -> uint8 [S, S, 3]. ValueError as the exact path."""
        pixels, _ = decode_box(data, lambda height, width: self.crop(draws, height, width))
        pixels = resize(pixels, self.image_size)
        if self.flips(draws):
            pixels = np.asarray(cv2.flip(pixels, 1), np.uint8)
        for name, magnitude in self.operations(draws):
            pixels = randaugment.apply(pixels, name, magnitude)
        return pixels


def resize(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] -> [side, side, 3] by the triangle filter, as Pillow's BILINEAR but for rounding."""
    height, width, _ = pixels.shape
    if max(height, width) <= side:
        return np.asarray(cv2.resize(pixels, (side, side), interpolation=cv2.INTER_LINEAR), np.uint8)
    resized = torch.empty(1, side, side, 3, dtype=torch.uint8)  # else torch makes it [3, side, side], in twice the time
    torch.ops.aten._upsample_bilinear2d_aa.out(
        torch.from_numpy(pixels).unsqueeze(0).permute(0, 3, 1, 2), [side, side], False, out=resized.permute(0, 3, 1, 2)
    )
    return resized[0].numpy()
