"""The exact path, and the reference of the fast one: Pillow decodes, torchvision crops, resizes and augments.

Shapes: S side of a square image.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from pipeline.augment.choices import Choices
from pipeline.recipe import Recipe
from shards.crop import decode


@dataclass(frozen=True)
class TrainTransform(Choices):
    """RandomResizedCrop (antialiased) and flip, as torchvision does them, then RandAugment."""

    def __call__(self, data: bytes, draws: np.ndarray) -> np.ndarray:
        """Encoded image and draws float64 [num_draws] in [0, 1) -> uint8 [S, S, 3]. ValueError as `decode`."""
        image = decode(data)
        box = self.crop(draws, image.height, image.width)
        image = F.resized_crop(image, *box, [self.image_size, self.image_size], InterpolationMode(self.interpolation))
        if self.flips(draws):
            image = F.hflip(image)
        return np.asarray(self.randaugment.on_image(image, self.of_randaugment(draws)))


@dataclass(frozen=True)
class EvalTransform:
    """Resize (bicubic, antialiased) so that the shorter side is `image_size / crop_pct`, then the centre crop.

    The shorter side is rounded to the nearest pixel (224 -> 256, 32 -> 37), the longer one down, as in torchvision.
    """

    image_size: int
    crop_pct: float = 0.875
    num_draws: ClassVar[int] = 0  # the same call as TrainTransform, without randomness

    @classmethod
    def of(cls, recipe: Recipe) -> "EvalTransform":
        """How the recipe's runs are evaluated."""
        return cls(recipe.augment.image_size, recipe.evaluation.crop_pct)

    @property
    def resized(self) -> int:
        """The shorter side before the crop."""
        return round(self.image_size / self.crop_pct)

    def __call__(self, data: bytes, draws: np.ndarray | None = None) -> np.ndarray:
        """Encoded image -> uint8 [S, S, 3]. ValueError as `decode`."""
        return self.pixels(decode(data))

    def pixels(self, image: Image.Image) -> np.ndarray:
        """RGB image -> uint8 [S, S, 3]."""
        image = F.resize(image, [self.resized], InterpolationMode.BICUBIC)
        return np.asarray(F.center_crop(image, [self.image_size, self.image_size]))
