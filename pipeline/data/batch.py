"""What travels from workers to the model.

Shapes: B samples of a micro-batch, H and W pixels.
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shards.reader import BadSample

PADDING = -1
UNREADABLE = -1


class Request(NamedTuple):
    """What a worker is asked for: the samples `ids`, which stand at `first` in the global batch of `step`."""

    ids: np.ndarray
    first: int
    step: int
    epoch: int


class Replaced(NamedTuple):
    """A bad sample, and the id of the sample that was read instead; PADDING where none was."""

    error: BadSample
    substitute: int


class Filled(NamedTuple):
    """What a worker answers, once the images of a request are in their place: labels int64 [B], and what was bad."""

    labels: np.ndarray
    bad: tuple[Replaced, ...]


@dataclass(frozen=True)
class Batch:
    """images uint8 [B, 3, H, W] (in memory [B, H, W, 3]), labels int64 [B] (UNREADABLE for padding, and for a bad
    sample that nothing replaces), ids int64 [B] as planned (PADDING where evaluation fills up), and the micro-batch's
    first position in the global batch, its optimizer step over the whole run, its epoch, and the bad samples that were
    met for it."""

    images: Tensor
    labels: Tensor
    ids: Tensor
    first: int
    step: int
    epoch: int
    bad: tuple[Replaced, ...] = ()

    def to(self, device: torch.device) -> "Batch":
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("images", "labels")}
        return dataclasses.replace(self, **moved)

    def pin_memory(self) -> "Batch":
        return dataclasses.replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())
