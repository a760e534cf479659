"""What a sample's draws choose: where it is cropped, whether it is flipped, which of RandAugment's operations follow.

Nothing here owns random state: every choice follows from a vector of draws keyed by (seed, epoch, sample), so what
enters the model depends neither on the world nor on the number of workers.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from torchvision.transforms.autoaugment import RandAugment

from shards.crop import Box

CROP_ATTEMPTS = 10  # as torchvision; two draws each (area, ratio), then two for the position
CROP_DRAWS = 2 * CROP_ATTEMPTS + 2
RANDAUGMENT_BINS = 31
Interpolation = Literal["bilinear", "bicubic"]


class Operation(NamedTuple):
    """One of RandAugment's, with its magnitude in the units of torchvision; `signed` ones go both ways."""

    name: str
    magnitude: float
    signed: bool


@dataclass(frozen=True)
class Choices:
    """RandomResizedCrop, horizontal flip and RandAugment, as torchvision draws them.

    `hflip` is a probability; `randaugment_magnitude` is a bin of 0 to 30; `randaugment_ops` 0 switches RandAugment off.
    """

    image_size: int
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    randaugment_ops: int = 0
    randaugment_magnitude: int = 0
    interpolation: Interpolation = "bilinear"

    @property
    def num_draws(self) -> int:
        """Length of the vector that a sample needs: the crop, the flip, and two for each RandAugment operation."""
        return CROP_DRAWS + 1 + 2 * self.randaugment_ops

    def crop(self, draws: np.ndarray, height: int, width: int) -> Box:
        return crop_box(draws[:CROP_DRAWS].tolist(), height, width, self.crop_scale, self.crop_ratio)

    def flips(self, draws: np.ndarray) -> bool:
        return bool(draws[CROP_DRAWS] < self.hflip)

    def operations(self, draws: np.ndarray) -> Iterator[tuple[str, float]]:
        """Name and signed magnitude of each operation."""
        operations = randaugment_operations(self.image_size, self.randaugment_magnitude)
        for operation_draw, sign_draw in draws[CROP_DRAWS + 1 :].reshape(self.randaugment_ops, 2).tolist():
            operation = operations[int(operation_draw * len(operations))]
            yield operation.name, -operation.magnitude if operation.signed and sign_draw >= 0.5 else operation.magnitude


def crop_box(
    draws: list[float], height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Where RandomResizedCrop cuts an image of height x width pixels, given draws [CROP_DRAWS].

    The rule of `torchvision.transforms.RandomResizedCrop.get_params`: the first of ten tries that fits, of an area
    uniform in `scale` and a width/height log-uniform in `ratio`; else the largest centred box with a ratio in range.
    """
    for attempt in range(0, 2 * CROP_ATTEMPTS, 2):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[attempt])
        aspect = math.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * draws[attempt + 1])
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top_draw, left_draw = draws[2 * CROP_ATTEMPTS :]
            top, left = int(top_draw * (height - crop_height + 1)), int(left_draw * (width - crop_width + 1))
            return Box(top, left, crop_height, crop_width)
    return _centre_box(height, width, ratio)


def _centre_box(height: int, width: int, ratio: tuple[float, float]) -> Box:
    crop_height, crop_width = height, width
    if width < height * min(ratio):
        crop_height = round(width / min(ratio))
    elif width > height * max(ratio):
        crop_width = round(height * max(ratio))
    return Box((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


@functools.cache
def randaugment_operations(image_size: int, magnitude: int) -> tuple[Operation, ...]:
    """torchvision's RandAugment table (31 bins) at one magnitude, for square images of `image_size` pixels."""
    space = RandAugment()._augmentation_space(RANDAUGMENT_BINS, (image_size, image_size))
    return tuple(
        Operation(name, float(magnitudes[magnitude]) if magnitudes.ndim else 0.0, signed)
        for name, (magnitudes, signed) in space.items()
    )
