"""What a sample's draws choose: where it is cropped, whether it is flipped, which of RandAugment's operations follow.

Nothing here owns random state: every choice follows from a vector of draws keyed by (seed, epoch, sample), so what
enters the model depends neither on the world nor on the number of workers.
"""

import math
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from pipeline.augment.policies import NO_OPERATIONS, Policy, policy_of
from pipeline.recipe import Augment
from shards.crop import Box

CROP_ATTEMPTS = 10  # as torchvision; two draws each (area, ratio), then two for the position
CROP_DRAWS = 2 * CROP_ATTEMPTS + 2
Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class Choices:
    """RandomResizedCrop and horizontal flip, as torchvision draws them, and RandAugment; `hflip` is a probability."""

    image_size: int
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    interpolation: Interpolation = "bilinear"
    randaugment: Policy = NO_OPERATIONS

    @classmethod
    def of(cls, section: Augment) -> Self:
        return cls(
            section.image_size,
            section.crop_scale,
            section.crop_ratio,
            section.hflip,
            section.interpolation,
            policy_of(section),
        )

    @property
    def num_draws(self) -> int:
        """Length of the vector that a sample needs: the crop, the flip, and what RandAugment takes."""
        return CROP_DRAWS + 1 + self.randaugment.num_draws

    def crop(self, draws: np.ndarray, height: int, width: int) -> Box:
        return crop_box(draws[:CROP_DRAWS].tolist(), height, width, self.crop_scale, self.crop_ratio)

    def flips(self, draws: np.ndarray) -> bool:
        return bool(draws[CROP_DRAWS] < self.hflip)

    def of_randaugment(self, draws: np.ndarray) -> np.ndarray:
        """The draws that RandAugment takes."""
        return draws[CROP_DRAWS + 1 :]


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
