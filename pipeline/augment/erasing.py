"""Random erasing of a whole batch, on its device, by draws of its samples.

Shapes: B batch, H height, W width.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from pipeline.augment.device import ERASING_DRAWS, ERASING_SCALE, erase, erasing_boxes

NOISE_STREAM = 0x6E6F697365  # keeps the noise apart from other uses of the same seed
NUM_OFFSETS = 1 << 22
Fill = Callable[[Tensor, Tensor], Tensor | float]


def mean(images: Tensor, draws: Tensor) -> float:
    """The mean of normalised images."""
    return 0.0


@dataclass(frozen=True)
class Noise:
    """Normal noise a pixel and channel, as timm's RandomErasing of mode "pixel" fills with.

    What fills a sample follows from its own draw, whoever else is in the batch. A generator a sample would be a loop of
    small kernels, a hash of every pixel dozens of passes over the batch. So all read from one bank of normal values, in
    one pass, each from a place of its own: two samples may share values, but hardly ever at the same pixels.
    """

    seed: int

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Images float [B, 3, H, W] and a draw in [0, 1) of each, float64 [B] -> noise of the images' shape."""
        size = images[0].numel()
        bank = _bank(self.seed, NUM_OFFSETS - 1 + size, images.device)
        return bank.unfold(0, size, 1)[(draws * NUM_OFFSETS).long()].view_as(images)


@functools.lru_cache(maxsize=1)
def _bank(seed: int, size: int, device: torch.device) -> Tensor:
    """float32 [size], from NumPy's generator: the same on every device."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([NOISE_STREAM, seed])))
    return torch.from_numpy(generator.standard_normal(size, np.float32)).to(device)


@dataclass(frozen=True)
class Erasing:
    """A box of a sample is filled with a given probability; `scale`: range of its share of the image's area."""

    probability: float
    scale: tuple[float, float] = ERASING_SCALE
    fill: Fill = mean
    num_draws: ClassVar[int] = ERASING_DRAWS + 1

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Normalised images float [B, 3, H, W], draws float64 [B, num_draws] in [0, 1) -> images."""
        height, width = images.shape[-2:]
        boxes = erasing_boxes(draws[:, :ERASING_DRAWS], self.probability, height, width, self.scale)
        return erase(images, boxes, self.fill(images, draws[:, ERASING_DRAWS]))
