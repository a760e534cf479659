"""The training objective: one criterion for every head, added up unweighted, as the authors of ViTTM train."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.sharded import Shard


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the batch. logits, targets: [B, C]; targets are probabilities."""
    return F.cross_entropy(logits, targets)


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed over classes, mean over the batch. logits, targets: [B, C]; targets lie in 0 .. 1."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(logits)


CRITERIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": cross_entropy, "bce": binary_cross_entropy}


class Objective(Protocol):
    """What is minimised: of a model's outputs and targets [B, C]. num_bytes: of what it keeps on the device; state: of
    that, what is to be saved and loaded with the run."""

    @property
    def num_bytes(self) -> int: ...
    def __call__(self, outputs: Tensor, targets: Tensor, /) -> Tensor: ...
    def state(self) -> list[Shard]: ...


class SummedOverHeads:
    """criterion(outputs, targets): the sum over a model's heads, in fp32."""

    num_bytes = 0

    def __init__(self, name: str) -> None:
        self.criterion = CRITERIA[name]

    def __call__(self, outputs: Tensor | tuple[Tensor, ...], targets: Tensor) -> Tensor:
        losses = [self.criterion(logits.float(), targets) for logits in heads_of(outputs)]
        return torch.stack(losses).sum()

    def state(self) -> list[Shard]:
        return []


def heads_of(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The logits of each head, [B, C], of a model with one head or several."""
    return outputs if isinstance(outputs, tuple) else (outputs,)
