"""From JPEG bytes to what enters the model: decode, crop, flip, RandAugment; then normalise, erase, mix on the device.

This is the exact path: Pillow and torchvision do the pixels. Nothing here owns random state: every choice comes from a
vector of draws keyed by (seed, epoch, sample), or, for mixing, from (seed, step), so what enters the model depends
neither on the world nor on the number of workers.

Shapes: B batch, C classes, H height, W width, S side of a square image. A box is (top, left, height, width) in pixels.
"""

import functools
import io
import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import RandAugment, _apply_op

from shards.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

CROP_ATTEMPTS = 10  # as torchvision; two draws each (area, ratio), then two for the position
CROP_DRAWS = 2 * CROP_ATTEMPTS + 2
ERASING_DRAWS = 1 + CROP_DRAWS  # erase or not, then as a crop
ERASING_SCALE = (0.02, 0.33)
ERASING_RATIO = (0.3, 3.3)
RANDAUGMENT_BINS = 31
MIXING_STREAM = 0x6D69786  # keeps the mixing draws apart from other uses of the same (seed, step)


class Box(NamedTuple):
    top: int
    left: int
    height: int
    width: int


NO_BOX = Box(0, 0, 0, 0)


def decode(data: bytes) -> Image.Image:
    """The image in `data` as Pillow RGB; alpha is dropped, 16-bit grey keeps its high byte, EXIF rotation is ignored.

    Raises ValueError, naming the cause, when Pillow cannot read the whole image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _to_rgb(image)
    except Exception as error:  # Pillow's plugins raise many types on bad bytes
        raise ValueError(f"cannot decode an image from {len(data)} bytes: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow's own conversion clips 16-bit grey at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info:  # the same pixels as a direct conversion, without its warning
        image = image.convert("RGBA")
    return image.convert("RGB")


def _to_array(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


@dataclass(frozen=True)
class TrainTransform:
    """RandomResizedCrop (bilinear, antialiased), horizontal flip, RandAugment, in this order, as torchvision does them.

    `hflip` is a probability; `randaugment_magnitude` is a bin of 0 to 30; `randaugment_ops` 0 switches RandAugment off.
    """

    image_size: int
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    randaugment_ops: int = 0
    randaugment_magnitude: int = 0

    @property
    def num_draws(self) -> int:
        """Length of the vector that `__call__` needs: the crop, the flip, and two for each RandAugment operation."""
        return CROP_DRAWS + 1 + 2 * self.randaugment_ops

    def __call__(self, data: bytes, draws: np.ndarray) -> np.ndarray:
        """Encoded image and draws float64 [num_draws] in [0, 1) -> uint8 [3, S, S]. Raises ValueError as `decode`."""
        image = decode(data)
        size = [self.image_size, self.image_size]
        box = crop_box(draws[:CROP_DRAWS], image.height, image.width, self.crop_scale, self.crop_ratio)
        image = F.resized_crop(image, *box, size, InterpolationMode.BILINEAR)
        if draws[CROP_DRAWS] < self.hflip:
            image = F.hflip(image)
        for operation_draw, sign_draw in draws[CROP_DRAWS + 1 :].reshape(self.randaugment_ops, 2):
            image = self._randaugment(image, operation_draw, sign_draw)
        return _to_array(image)

    def _randaugment(self, image: Image.Image, operation_draw: float, sign_draw: float) -> Image.Image:
        operations = randaugment_operations(self.image_size, self.randaugment_magnitude)
        operation = operations[int(operation_draw * len(operations))]
        sign = -1.0 if operation.signed and sign_draw >= 0.5 else 1.0
        return _apply_op(image, operation.name, sign * operation.magnitude, InterpolationMode.NEAREST, fill=None)


def crop_box(draws: np.ndarray, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]) -> Box:
    """Where RandomResizedCrop cuts an image of height x width pixels, given draws float64 [CROP_DRAWS].

    The rule of `torchvision.transforms.RandomResizedCrop.get_params`: the first of ten tries that fits, of an area
    uniform in `scale` and a width/height log-uniform in `ratio`; else the largest centred box with a ratio in range.
    """
    for area_draw, ratio_draw in draws[: 2 * CROP_ATTEMPTS].reshape(CROP_ATTEMPTS, 2):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = math.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * ratio_draw)
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


class Operation(NamedTuple):
    name: str
    magnitude: float
    signed: bool


@functools.cache
def randaugment_operations(image_size: int, magnitude: int) -> tuple[Operation, ...]:
    """torchvision's RandAugment table (31 bins) at one magnitude, for square images of `image_size` pixels."""
    space = RandAugment()._augmentation_space(RANDAUGMENT_BINS, (image_size, image_size))
    return tuple(
        Operation(name, float(magnitudes[magnitude]) if magnitudes.ndim else 0.0, signed)
        for name, (magnitudes, signed) in space.items()
    )


@dataclass(frozen=True)
class EvalTransform:
    """Resize (bicubic, antialiased) so that the shorter side is `image_size * resize_ratio`, then the centre crop.

    The shorter side is rounded to the nearest pixel (224 -> 256, 32 -> 37), the longer one down, as in torchvision.
    """

    image_size: int
    resize_ratio: float = 256 / 224
    num_draws: ClassVar[int] = 0  # the same call as TrainTransform, without randomness

    def __call__(self, data: bytes, draws: np.ndarray | None = None) -> np.ndarray:
        """Encoded image -> uint8 [3, S, S]. Raises ValueError as `decode`."""
        image = F.resize(decode(data), [round(self.image_size * self.resize_ratio)], InterpolationMode.BICUBIC)
        return _to_array(F.center_crop(image, [self.image_size, self.image_size]))


@functools.cache
def _channel_constants(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, std


def normalise(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 of the same shape, with ImageNet's mean and deviation of pixels in 0 to 1."""
    mean, std = _channel_constants(images.device)
    return images.float().div_(255).sub_(mean).div_(std)


def erasing_boxes(draws: Tensor, probability: float, height: int, width: int) -> Tensor:
    """Draws float64 [B, ERASING_DRAWS] -> boxes int64 [B, 4] (top, left, height, width); all zero: nothing to erase.

    The rule of `torchvision.transforms.RandomErasing`, a box a sample: the first of ten tries that is smaller than the
    image, of an area uniform in ERASING_SCALE and a height/width log-uniform in ERASING_RATIO.
    """
    erased, tries, position = draws[:, 0] < probability, draws[:, 1:-2].unflatten(1, (CROP_ATTEMPTS, 2)), draws[:, -2:]
    area = height * width * (ERASING_SCALE[0] + (ERASING_SCALE[1] - ERASING_SCALE[0]) * tries[..., 0])
    low, high = (math.log(ratio) for ratio in ERASING_RATIO)
    aspect = torch.exp(low + (high - low) * tries[..., 1])
    sizes = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], dim=-1).round().long()  # [B, tries, 2]
    limits = torch.tensor([height, width], device=draws.device)
    fits = (sizes < limits).all(dim=-1)
    first = fits.long().argmax(dim=1)  # of equal values, the first
    size = sizes[torch.arange(len(sizes), device=draws.device), first]
    boxes = torch.cat([(position * (limits - size + 1)).long(), size], dim=1)
    return boxes * (erased & fits.any(dim=1)).unsqueeze(1)


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Zeros the boxes int64 [B, 4] of normalised images float [B, 3, H, W], each sample its own."""
    top, left, height, width = boxes.unsqueeze(-1).unbind(1)  # each [B, 1]
    rows, columns = (torch.arange(side, device=images.device) for side in images.shape[-2:])
    in_rows = (rows >= top) & (rows < top + height)
    in_columns = (columns >= left) & (columns < left + width)
    return images.masked_fill((in_rows.unsqueeze(2) & in_columns.unsqueeze(1)).unsqueeze(1), 0)


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Labels int64 [B] -> targets float32 [B, C]."""
    return torch.nn.functional.one_hot(labels, num_classes).float()


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
    """MixUp (arXiv 1710.09412), CutMix (arXiv 1905.04899), or one picked uniformly; lambda ~ Beta(alpha, alpha)."""

    mixup: bool
    cutmix: bool
    alpha: float

    def draw(self, seed: int, step: int, height: int, width: int) -> Mix:
        """The mix of global batch `step`, the same on every rank, for images of height x width pixels."""
        kinds = [kind for kind in ("mixup", "cutmix") if getattr(self, kind)]
        if not kinds:
            return Mix()
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([MIXING_STREAM, seed, step])))
        kind = kinds[generator.integers(len(kinds))]
        lam = float(generator.beta(self.alpha, self.alpha))
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
