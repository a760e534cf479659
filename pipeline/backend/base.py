"""What the trainer, the checkpoint and the averages ask of a backend."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.backend.engine_files import EngineWriter
from pipeline.backend.world import World

Criterion = Callable[[Any, Tensor], Tensor]
Mixed = tuple[Tensor, Tensor]


class Stepped(NamedTuple):
    """What a step leaves: this rank's mean loss, and the global gradient norm before clipping; both 0-d tensors."""

    loss: Tensor
    grad_norm: Tensor


@dataclass(frozen=True)
class StepOptions:
    """Micro-batches a step, the largest gradient norm (0: no clipping), and bf16 autocast of the forward pass."""

    accumulation: int = 1
    clip_norm: float = 0.0
    bf16: bool = False


class Backend(ABC):
    """A model and its optimizer, distributed by one strategy; built by `pipeline.backend.wrap`.

    `model` is what to call; `optimizer` is whose param_groups hold the learning rate.
    """

    def __init__(self, world: World, model: nn.Module, optimizer: torch.optim.Optimizer, options: StepOptions) -> None:
        self.world = world
        self.model = model
        self.optimizer = optimizer
        self.options = options

    @property
    def module(self) -> nn.Module:
        """The model without a wrapper: evaluation calls it, and parameter names are its own."""
        return self.model

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.options.bf16)

    def forward_loss(self, criterion: Criterion, batch: Mixed) -> Tensor:
        """Loss of one mixed micro-batch: images float [B, 3, H, W], targets float [B, C]."""
        images, targets = batch
        with self.autocast():
            outputs = self.model(images)
        return criterion(outputs, targets)

    def set_lr(self, lr: float) -> None:
        """A group with an `lr_scale` gets that share of it."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

    def warm_up(self, criterion: Criterion, batch: Mixed) -> None:  # noqa: B027 - most backends need none
        """Brings the backend into the state it has after its first steps, where that changes the order of sums."""

    @abstractmethod
    def step(self, criterion: Criterion, batches: Sequence[Mixed]) -> Stepped:
        """One optimizer step over the micro-batches of this rank."""

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter by its name, detached but sharing its storage: whole, or a DTensor that holds a shard."""
        return {name: parameter.detach() for name, parameter in self.module.named_parameters()}

    @abstractmethod
    def save_engine(self, directory: Path) -> None:
        """Writes model and optimizer below `directory`; every rank calls it."""

    def stage_engine(self) -> EngineWriter | None:
        """A copy of model and optimizer in CPU memory, as what writes it where `save_engine` would, in any thread, over
        a group of that thread; None where only `save_engine` can write them. Every rank calls it."""
        return None

    @abstractmethod
    def load_engine(self, directory: Path) -> None:
        """Reads what `save_engine` wrote; every rank calls it."""

    @abstractmethod
    def full_weights(self) -> dict[str, Tensor]:
        """The whole model on the CPU of rank 0, by the module's own names; every rank calls it, others get {}."""

    @abstractmethod
    def close(self) -> None:
        """Frees what a following backend of the same launch could trip over."""
