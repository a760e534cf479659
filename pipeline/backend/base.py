"""What the trainer, the checkpoint and the averages ask of a backend."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.backend.engine_files import EngineWriter
from pipeline.backend.statistics import Statistics
from pipeline.backend.world import World
from pipeline.recipe import Recipe
from pipeline.sharded import Shard

Criterion = Callable[[Any, Tensor], Tensor]
Mixed = tuple[Tensor, Tensor]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Stepped(NamedTuple):
    """What a step leaves: the mean loss over the global batch and the gradient norm before clipping, both 0-d tensors,
    and whether the weights were changed, which they are not where one of both is not finite; the same on every rank."""

    loss: Tensor
    grad_norm: Tensor
    applied: bool = True


@dataclass(frozen=True)
class StepOptions:
    """How a step is computed: samples over all ranks, micro-batches of a rank, the largest gradient norm (0: no
    clipping), the arithmetic as the recipe's runtime.precision has it, groups of ranks that hold a whole model each
    (FSDP2 alone), torch.compile's backend for the layers ("off": none), and every how-manieth layer computes its
    activations twice (0: none)."""

    global_batch: int
    accumulation: int = 1
    clip_norm: float = 0.0
    precision: str = "fp32"
    replicas: int = 1
    compiler: str = "off"
    recompute_every: int = 0

    @classmethod
    def of(cls, recipe: Recipe) -> "StepOptions":
        runtime = recipe.runtime
        step = recipe.data.global_batch, recipe.data.accumulation, recipe.optimizer.clip_norm, runtime.precision
        return cls(*step, runtime.fsdp_replicas, runtime.compile, runtime.activation_checkpointing)


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
    @abstractmethod
    def name(self) -> str:
        """The strategy, as launch files name it: what one wrote, another may not be able to read."""

    @property
    def stepping(self) -> torch.optim.Optimizer:
        """The optimizer of torch whose `step` is called in the end, with what this rank updates and its gradients."""
        return self.optimizer

    @property
    def module(self) -> nn.Module:
        """The model without a wrapper: evaluation calls it, and parameter names are its own."""
        return self.model

    def autocast(self) -> torch.autocast:
        return autocast(self.world.device, self.options.precision)

    def forward_loss(self, criterion: Criterion, batch: Mixed) -> Tensor:
        """Loss of one mixed micro-batch: images float [B, 3, H, W], targets float [B, C].

        Ranks and micro-batches are averaged, whatever they hold. So that losses and gradients come to the means over
        the samples of the global batch, a micro-batch of n samples counts n / m times, where m is their mean size.
        """
        images, targets = batch
        with self.autocast():
            outputs = self.model(images)
        loss = criterion(outputs, targets)
        parts = self.world.size * self.options.accumulation
        is_mean = len(targets) * parts == self.options.global_batch  # as always where all are equal
        return loss if is_mean else loss * (len(targets) * parts / self.options.global_batch)

    def agreed(self, loss: Tensor) -> float:
        """The mean of the ranks' `forward_loss`, so that all know whether it is finite. Whoever decides on a
        backward pass has to: this waits for the forward pass on the device; the ranks agree on the CPU."""
        return self.world.sum([loss.item()])[0] / self.world.size

    def set_lr(self, lr: float) -> None:
        """A group with an `lr_scale` gets that share of it."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

    def warm_up(self, criterion: Criterion, batch: Mixed) -> None:  # noqa: B027 - most backends need none
        """Brings the backend into the state it has after its first steps, where that changes the order of sums. Raises
        Stopped where a rank is signalled to stop."""

    @functools.cached_property
    def statistics(self) -> Statistics:
        return Statistics(self.module)

    def step(self, criterion: Criterion, batches: Sequence[Mixed]) -> Stepped:
        """One optimizer step over the micro-batches of this rank; none where a loss or the norm is not finite."""
        before = self.statistics.copy()
        stepped = self._step(criterion, batches)
        self.statistics.settle(before, stepped.applied, self.world)
        return stepped

    @abstractmethod
    def _step(self, criterion: Criterion, batches: Sequence[Mixed]) -> Stepped:
        """The same, of what the optimizer updates."""

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The trainable parameters by their names."""
        return [(name, parameter) for name, parameter in self.module.named_parameters() if parameter.requires_grad]

    @abstractmethod
    def shards(self) -> list[Shard]:
        """This rank's piece of every trainable parameter in fp32, sharing the storage that the optimizer updates."""

    def averaged(self) -> list[Shard]:
        """What an average follows: `shards()`, and the statistics of batch norms, which belong to the weights."""
        return self.shards() + self.statistics.shards()

    def publish(self) -> None:  # noqa: B027 - in most backends the model computes with the pieces themselves
        """Makes the model compute with what was written into `averaged()` by hand; every rank calls it."""

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters())

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

    def close(self) -> None:
        """Frees what a following backend of the same launch could trip over."""
        if self.options.compiler != "off":
            torch._dynamo.reset()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """What the forward pass runs under, by the recipe's runtime.precision."""
    dtype = AUTOCAST.get(precision)
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def mean(losses: Sequence[float]) -> Tensor:
    """Of the micro-batches' losses."""
    return torch.tensor(losses, dtype=torch.float64).mean()


def skipped(losses: Sequence[float]) -> Stepped:
    """Of a step that ended with a loss that is not finite."""
    return Stepped(mean(losses), torch.tensor(float("nan")), applied=False)
