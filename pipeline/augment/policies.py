"""RandAugment's policies: which operations a sample's draws ask for, and how strong they are.

A policy is applied to Pillow images on the exact path and to uint8 arrays on the fast one; of equal pixels both make
equal ones. Shapes: S side of a square image.
"""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN
from timm.data.auto_augment import (
    _LEVEL_DENOM,
    _RAND_INCREASING_TRANSFORMS,
    _RAND_TRANSFORMS,
    LEVEL_TO_ARG,
    NAME_TO_OP,
    posterize,
)
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import RandAugment, _apply_op

from pipeline.augment import randaugment
from pipeline.recipe import Augment

RANDAUGMENT_BINS = 31
FILL = tuple(round(255 * mean) for mean in IMAGENET_DEFAULT_MEAN)
WARPS = {"Rotate": 30.0, "ShearX": 0.3, "ShearY": 0.3, "TranslateXRel": 0.45, "TranslateYRel": 0.45}
ENHANCEMENTS = ("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing")
SMALLEST_DRAW = 2.0**-54  # in place of 0, of which the normal distribution has no quantile


class Policy(Protocol):
    """An image of side S and draws float64 [num_draws] in [0, 1) -> the image after the operations they ask for."""

    @property
    def num_draws(self) -> int: ...

    def on_image(self, image: Image.Image, draws: np.ndarray) -> Image.Image: ...

    def on_pixels(self, pixels: NDArray[np.uint8], draws: np.ndarray) -> NDArray[np.uint8]: ...


def policy_of(section: Augment) -> Policy:
    ops, magnitude = section.randaugment_ops, section.randaugment_magnitude
    if section.randaugment == "torchvision":
        return TorchvisionPolicy(ops, magnitude)
    increasing = section.randaugment == "timm-increasing"
    return TimmPolicy(ops, magnitude, section.randaugment_std, section.interpolation, increasing)


# --- torchvision's


class Operation(NamedTuple):
    """One of RandAugment's, with its magnitude in the units of torchvision; `signed` ones go both ways."""

    name: str
    magnitude: float
    signed: bool


@dataclass(frozen=True)
class TorchvisionPolicy:
    """`torchvision.transforms.RandAugment`: `magnitude` is a bin of 0 to 30; no operations switch RandAugment off."""

    num_ops: int = 0
    magnitude: int = 0

    @property
    def num_draws(self) -> int:
        return 2 * self.num_ops

    def operations(self, draws: np.ndarray, side: int) -> Iterator[tuple[str, float]]:
        """Name and signed magnitude of each operation."""
        operations = randaugment_operations(side, self.magnitude)
        for operation_draw, sign_draw in draws.reshape(self.num_ops, 2).tolist():
            operation = operations[int(operation_draw * len(operations))]
            yield operation.name, -operation.magnitude if operation.signed and sign_draw >= 0.5 else operation.magnitude

    def on_image(self, image: Image.Image, draws: np.ndarray) -> Image.Image:
        for name, magnitude in self.operations(draws, image.width):
            image = _apply_op(image, name, magnitude, InterpolationMode.NEAREST, fill=None)
        return image

    def on_pixels(self, pixels: NDArray[np.uint8], draws: np.ndarray) -> NDArray[np.uint8]:
        for name, magnitude in self.operations(draws, len(pixels)):
            pixels = randaugment.apply(pixels, name, magnitude)
        return pixels


NO_OPERATIONS = TorchvisionPolicy()


@functools.cache
def randaugment_operations(image_size: int, magnitude: int) -> tuple[Operation, ...]:
    """torchvision's RandAugment table (31 bins) at one magnitude, for square images of `image_size` pixels."""
    space = RandAugment()._augmentation_space(RANDAUGMENT_BINS, (image_size, image_size))
    return tuple(
        Operation(name, float(magnitudes[magnitude]) if magnitudes.ndim else 0.0, signed)
        for name, (magnitudes, signed) in space.items()
    )


# --- timm's


@dataclass(frozen=True)
class TimmPolicy:
    """timm's `rand-mM-mstdS-nN-inc1` as its create_transform makes it: N operations, each skipped as often as not, of
    magnitudes from a normal distribution around M of deviation S, cut to 0 .. 10; what comes from outside the image has
    ImageNet's mean colour. Not `increasing`, it is timm's without inc1, of whose operations some weaken with M.

    timm's own functions do the work; what they draw is drawn from the sample's draws here.
    """

    num_ops: int
    magnitude: int
    std: float = 0.0
    interpolation: str = "bilinear"
    increasing: bool = True

    @property
    def num_draws(self) -> int:
        return 4 * self.num_ops

    def operations(self, draws: np.ndarray) -> Iterator[tuple[str, tuple[float, ...]]]:
        """timm's name and arguments of each operation that is not skipped."""
        names = _RAND_INCREASING_TRANSFORMS if self.increasing else _RAND_TRANSFORMS
        for operation_draw, skip_draw, level_draw, sign_draw in draws.reshape(self.num_ops, 4).tolist():
            if skip_draw < 0.5:
                name = names[int(operation_draw * len(names))]
                yield name, arguments(name, self.level(level_draw), sign_draw >= 0.5)

    def level(self, draw: float) -> float:
        """The magnitude, 0 to 10."""
        normal = NormalDist().inv_cdf(max(draw, SMALLEST_DRAW))
        return max(0.0, min(self.magnitude + self.std * normal, _LEVEL_DENOM))

    def on_image(self, image: Image.Image, draws: np.ndarray) -> Image.Image:
        return self._apply(image, self.operations(draws))

    def on_pixels(self, pixels: NDArray[np.uint8], draws: np.ndarray) -> NDArray[np.uint8]:
        operations = list(self.operations(draws))
        return np.asarray(self._apply(Image.fromarray(pixels), operations)) if operations else pixels

    def _apply(self, image: Image.Image, operations: Iterable[tuple[str, tuple[float, ...]]]) -> Image.Image:
        resample = Image.Resampling[self.interpolation.upper()]
        for name, values in operations:
            image = OPERATIONS[name](image, *values, fillcolor=FILL, resample=resample)
        return image


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """timm's asks for no bits at all at one end of the magnitudes: black, until Pillow refused that (13 does)."""
    return posterize(image, bits) if bits else Image.new("RGB", image.size)


OPERATIONS: dict[str, Any] = NAME_TO_OP | {"Posterize": _posterize, "PosterizeIncreasing": _posterize}


def arguments(name: str, level: float, negative: bool) -> tuple[float, ...]:
    """Of one of timm's operations: what LEVEL_TO_ARG makes of a magnitude of 0 to 10, where that draws no
    sign, and what it would make of this sign, where it does."""
    sign, share = -1 if negative else 1, level / _LEVEL_DENOM
    if name in WARPS:
        return (sign * (share * WARPS[name]),)
    if name in ENHANCEMENTS:
        return (max(0.1, 1.0 + sign * (share * 0.9)),)
    of_level = LEVEL_TO_ARG[name]
    return of_level(level, {}) if of_level else ()
