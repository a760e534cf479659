"""A batch on its device into what the model and the criterion take."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.augment.device import ERASING_DRAWS, erase, erasing_boxes, normalise, one_hot
from pipeline.augment.mixing import Mixing
from pipeline.data.batch import Batch
from pipeline.data.samples import ERASING_STREAM
from shards.keyed import uniforms


@dataclass(frozen=True)
class DeviceAugment:
    """uint8 batch -> normalised, erased and mixed images float [B, 3, H, W], targets float [B, C], on its device."""

    num_classes: int
    seed: int
    erasing: float
    mixing: Mixing
    label_smoothing: float = 0.0

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        height, width = batch.images.shape[-2:]
        images = normalise(batch.images)
        if self.erasing:
            draws = torch.from_numpy(uniforms(self.seed, batch.epoch, batch.ids.numpy(), ERASING_STREAM, ERASING_DRAWS))
            boxes = erasing_boxes(draws.to(images.device), self.erasing, height, width)
            images = erase(images, boxes)
        mix = self.mixing.draw(self.seed, batch.step, height, width)
        return mix.apply(images, one_hot(batch.labels, self.num_classes, self.label_smoothing))
