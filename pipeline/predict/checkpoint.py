"""A model that is ready to be asked, whoever trained it: its weights, how it sees images, what its classes are called.

Shapes: B images, S side of a square image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from pipeline.augment.device import IMAGENET_MEAN, IMAGENET_STD, Channels, normalise
from pipeline.augment.exact import EvalTransform
from pipeline.recipe import Recipe
from shards.crop import decode
from shards.errors import UserError


@dataclass(frozen=True)
class TimmTransform:
    """The transform that timm evaluates a model with, up to uint8 pixels."""

    image_size: int
    transform: Callable[[Image.Image], Tensor]
    num_draws: ClassVar[int] = 0

    def __call__(self, data: bytes, draws: np.ndarray | None = None) -> np.ndarray:
        """Encoded image -> uint8 [S, S, 3]. ValueError as `decode`."""
        return self.pixels(decode(data))

    def pixels(self, image: Image.Image) -> np.ndarray:
        """RGB image -> uint8 [S, S, 3]."""
        return self.transform(image).permute(1, 2, 0).numpy()


@dataclass(frozen=True)
class View:
    """How a model sees an image: cut to uint8 [S, S, 3] by `transform`, made floats by mean and deviation of pixels in
    0 to 1."""

    transform: EvalTransform | TimmTransform
    mean: Channels = IMAGENET_MEAN
    std: Channels = IMAGENET_STD

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> float32 of the same shape."""
        return normalise(images, self.mean, self.std)


def view_of_timm(model: nn.Module, name: str) -> View:
    """What the model's own configuration (pretrained_cfg) says, as timm reads it. Raises UserError where its images are
    not square or not RGB."""
    config = resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        raise UserError(
            f"{name} takes images of {channels} x {height} x {width} (channels, height, width), and only square ones "
            "of 3 channels are made here: use timm's own validate.py and inference.py"
        )
    transform = create_transform(**config, normalize=False)
    return View(TimmTransform(height, transform), tuple(config["mean"]), tuple(config["std"]))


@dataclass(frozen=True)
class Checkpoint:
    """`model` in eval mode; `classes`: names in order of the labels, None where nobody knows them, and `named`, who
    says so; `recipe` of our own runs. `name`: what messages call it."""

    name: str
    model: nn.Module
    view: View
    classes: tuple[str, ...] | None = None
    named: str = ""
    recipe: Recipe | None = None

    @property
    def num_classes(self) -> int:
        return int(self.model.num_classes)  # type: ignore[arg-type] # every model of timm has it

    def class_name(self, label: int) -> str:
        """The number itself where the class has no name."""
        return self.classes[label] if self.classes else str(label)
