"""MixUp and CutMix: drawn once a global batch, between neighbours, so that any even slice is mixed as in the whole.

Shapes: B batch, C classes, H height, W width.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from shards.crop import Box
from shards.errors import UserError

MIXING_STREAM = 0x6D69786  # keeps the mixing draws apart from other uses of the same (seed, step)
NO_BOX = Box(0, 0, 0, 0)


@dataclass(frozen=True)
class Mix:
    """How one global batch is mixed: `lam` is the share of a sample's own target, `box` the part its partner covers."""

    kind: Literal["mixup", "cutmix", "none"] = "none"
    lam: float = 1.0
    box: Box = NO_BOX  # cutmix only

    def apply(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mixes images float [B, 3, H, W] and targets float [B, C] with their neighbours in pairs, i with i ^ 1.

        Raises UserError when B is odd. Any even slice of a batch is mixed as it would be inside the whole.
        """
        if self.kind == "none":
            return images, targets
        mixed = self._blend(images) if self.kind == "mixup" else self._paste(images)
        return mixed, self._blend(targets)

    def _blend(self, values: Tensor) -> Tensor:
        return self.lam * values + (1 - self.lam) * _neighbours(values)

    def _paste(self, images: Tensor) -> Tensor:
        top, left, height, width = self.box
        part = (..., slice(top, top + height), slice(left, left + width))
        images = images.clone()
        images[part] = _neighbours(images[part])
        return images


def _neighbours(values: Tensor) -> Tensor:
    if len(values) % 2:
        raise UserError(
            f"mixup and cutmix mix samples in pairs, and a micro-batch of {len(values)} leaves one over; "
            "take an even batch a rank, or switch mixup and cutmix off"
        )
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


@dataclass(frozen=True)
class Mixing:
    """MixUp (arXiv 1710.09412), CutMix (arXiv 1905.04899), or one picked uniformly; lambda ~ Beta(alpha, alpha), each
    with its own alpha."""

    mixup: bool
    cutmix: bool
    mixup_alpha: float
    cutmix_alpha: float

    def draw(self, seed: int, step: int, height: int, width: int) -> Mix:
        """The mix of global batch `step`, the same on every rank, for images of height x width pixels."""
        kinds = [kind for kind in ("mixup", "cutmix") if getattr(self, kind)]
        if not kinds:
            return Mix()
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([MIXING_STREAM, seed, step])))
        kind = kinds[generator.integers(len(kinds))]
        alpha = self.mixup_alpha if kind == "mixup" else self.cutmix_alpha
        lam = float(generator.beta(alpha, alpha))
        return Mix("mixup", lam) if kind == "mixup" else _cutmix(lam, generator.random(2), height, width)


def _cutmix(lam: float, centre_draws: np.ndarray, height: int, width: int) -> Mix:
    """As `torchvision.transforms.v2.CutMix`: a box of share 1 - lam at a uniform centre, clipped; lam follows it."""
    row, column = int(centre_draws[0] * height), int(centre_draws[1] * width)
    half = 0.5 * math.sqrt(1 - lam)
    half_height, half_width = int(half * height), int(half * width)
    top, bottom = max(row - half_height, 0), min(row + half_height, height)
    left, right = max(column - half_width, 0), min(column + half_width, width)
    box = Box(top, left, bottom - top, right - left)
    return Mix("cutmix", 1 - box.height * box.width / (height * width), box)
