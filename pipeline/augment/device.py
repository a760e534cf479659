"""What is done to a whole batch, on its device: to floats, and random erasing.

Shapes: B batch, C classes, H height, W width. A box is (top, left, height, width) in pixels.
"""

import functools
import math

import torch
from timm.data import mixup
from torch import Tensor

from pipeline.augment.choices import CROP_ATTEMPTS, CROP_DRAWS

Channels = tuple[float, ...]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ERASING_DRAWS = 1 + CROP_DRAWS  # erase or not, then as a crop
ERASING_SCALE = (0.02, 0.33)
ERASING_RATIO = (0.3, 3.3)


@functools.cache
def _channel_constants(device: torch.device, *constants: Channels) -> list[Tensor]:
    return [torch.tensor(values, device=device).view(3, 1, 1) for values in constants]


def normalise(images: Tensor, mean_of: Channels = IMAGENET_MEAN, std_of: Channels = IMAGENET_STD) -> Tensor:
    """uint8 [B, 3, H, W], in any memory format -> contiguous float32 of the same shape, by the mean and deviation of
    pixels in 0 to 1."""
    mean, std = _channel_constants(images.device, mean_of, std_of)
    return images.to(torch.float32, memory_format=torch.contiguous_format).div_(255).sub_(mean).div_(std)


def denormalise(images: Tensor) -> Tensor:
    """float [B, 3, H, W] -> uint8 of the same shape: what `normalise` made these of, rounded."""
    mean, std = _channel_constants(images.device, IMAGENET_MEAN, IMAGENET_STD)
    return images.mul(std).add(mean).mul(255).round().clamp(0, 255).to(torch.uint8)


def erasing_boxes(
    draws: Tensor, probability: float, height: int, width: int, scale: tuple[float, float] = ERASING_SCALE
) -> Tensor:
    """Draws float64 [B, ERASING_DRAWS] -> boxes int64 [B, 4] (top, left, height, width); all zero: nothing to erase.

    The rule of `torchvision.transforms.RandomErasing`, a box a sample: the first of ten tries that is smaller than the
    image, of an area uniform in `scale` and a height/width log-uniform in ERASING_RATIO.
    """
    erased, tries, position = draws[:, 0] < probability, draws[:, 1:-2].unflatten(1, (CROP_ATTEMPTS, 2)), draws[:, -2:]
    area = height * width * (scale[0] + (scale[1] - scale[0]) * tries[..., 0])
    low, high = (math.log(ratio) for ratio in ERASING_RATIO)
    aspect = torch.exp(low + (high - low) * tries[..., 1])
    sizes = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], dim=-1).round().long()  # [B, tries, 2]
    limits = torch.tensor([height, width], device=draws.device)
    fits = (sizes < limits).all(dim=-1)
    first = fits.long().argmax(dim=1)  # of equal values, the first
    size = sizes[torch.arange(len(sizes), device=draws.device), first]
    boxes = torch.cat([(position * (limits - size + 1)).long(), size], dim=1)
    return boxes * (erased & fits.any(dim=1)).unsqueeze(1)


def erase(images: Tensor, boxes: Tensor, fill: Tensor | float = 0.0) -> Tensor:
    """Images float [B, 3, H, W] with `fill`, a number or of their shape, in the boxes int64 [B, 4], each its own."""
    top, left, height, width = boxes.unsqueeze(-1).unbind(1)  # each [B, 1]
    rows, columns = (torch.arange(side, device=images.device) for side in images.shape[-2:])
    in_rows = (rows >= top) & (rows < top + height)
    in_columns = (columns >= left) & (columns < left + width)
    return torch.where((in_rows.unsqueeze(2) & in_columns.unsqueeze(1)).unsqueeze(1), fill, images)


def one_hot(labels: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """Labels int64 [B] -> targets float32 [B, C], of which `smoothing` is spread evenly over all classes, as timm's
    Mixup does (arXiv 1512.00567, section 7)."""
    off = smoothing / num_classes
    return mixup.one_hot(labels, num_classes, on_value=1.0 - smoothing + off, off_value=off)
