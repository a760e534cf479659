"""A batch on its device into what the model and the criterion take."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.augment.device import normalise, one_hot
from pipeline.augment.erasing import Erasing, Noise, mean
from pipeline.augment.mixing import Mixing
from pipeline.data.batch import Batch
from pipeline.data.samples import ERASING_STREAM
from pipeline.recipe import Recipe
from shards.keyed import uniforms


@dataclass(frozen=True)
class DeviceAugment:
    """uint8 batch -> normalised, erased and mixed images float [B, 3, H, W], targets float [B, C], on its device."""

    num_classes: int
    seed: int
    erasing: Erasing
    mixing: Mixing
    label_smoothing: float = 0.0

    @classmethod
    def of(cls, recipe: Recipe, num_classes: int) -> "DeviceAugment":
        section = recipe.augment
        fill = Noise(recipe.seed) if section.erasing_fill == "noise" else mean
        return cls(
            num_classes,
            recipe.seed,
            Erasing(section.erasing, section.erasing_scale, fill),
            Mixing(section.mixup, section.cutmix, section.mixup_alpha, section.cutmix_alpha),
            recipe.label_smoothing,
        )

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        height, width = batch.images.shape[-2:]
        images = normalise(batch.images)
        if self.erasing.probability:
            ids, count = batch.ids.numpy(), self.erasing.num_draws
            draws = torch.from_numpy(uniforms(self.seed, batch.epoch, ids, ERASING_STREAM, count))
            images = self.erasing(images, draws.to(images.device))
        mix = self.mixing.draw(self.seed, batch.step, height, width)
        return mix.apply(images, one_hot(batch.labels, self.num_classes, self.label_smoothing))
