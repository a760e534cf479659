"""One process, or data parallel: every rank holds the whole model (Accelerate's DistributedDataParallel)."""

from collections.abc import Sequence
from math import isfinite
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn

from pipeline.backend import engine_files
from pipeline.backend.base import Backend, Criterion, Mixed, StepOptions, Stepped, mean, skipped
from pipeline.backend.world import World
from pipeline.sharded import Shard
from shards.errors import UserError

WARM_UP_PASSES = 2
LOWEST_SCALE = 1.0


class DDP(Backend):
    """Gradients are averaged over ranks in the last micro-batch's backward pass.

    In fp16 the loss is scaled up; a step whose gradients overflow is computed again at half the scale.
    """

    def __init__(self, world: World, model: nn.Module, optimizer: torch.optim.Optimizer, options: StepOptions) -> None:
        self.accelerator = Accelerator(
            cpu=world.device.type == "cpu",
            mixed_precision="no",
            gradient_accumulation_plugin=accumulation_plugin(options.accumulation),
        )
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=options.precision == "fp16")
        super().__init__(world, self.accelerator.prepare_model(model), optimizer, options)
        self._check()

    @property
    def name(self) -> str:
        return "ddp"

    @property
    def module(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    def _step(self, criterion: Criterion, batches: Sequence[Mixed]) -> Stepped:
        while True:
            losses = self._backward(criterion, batches)
            if not isfinite(losses[-1]):
                self.model.zero_grad()
                return skipped(losses)
            norm, applied = self._optimize()
            if applied or not self._lower_scale():
                return Stepped(mean(losses), norm, applied)

    def warm_up(self, criterion: Criterion, batch: Mixed) -> None:
        """DDP re-orders its buckets after its first backward pass; a resumed run must sum in the order of one that
        went on, so every start makes discarded passes first (of which RNG and buffers are put back)."""
        if self.world.size == 1:
            return
        buffers = [buffer.clone() for buffer in self.module.buffers()]
        devices = [self.world.device] if self.world.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            for number in range(WARM_UP_PASSES):
                self.world.reach(f"warming up, pass {number + 1}")
                self.forward_loss(criterion, batch).backward()
        self.model.zero_grad()
        for buffer, kept in zip(self.module.buffers(), buffers, strict=True):
            buffer.copy_(kept)

    def shards(self) -> list[Shard]:
        return [Shard(name, parameter.detach().view(-1), 0, parameter.numel()) for name, parameter in self.trained()]

    def save_engine(self, directory: Path) -> None:
        engine_files.save(self.module, self.optimizer, directory, self._scale())

    def stage_engine(self) -> engine_files.EngineWriter:
        return engine_files.stage(self.module, self.optimizer, self._scale())

    def load_engine(self, directory: Path) -> None:
        scale = self._scale()
        engine_files.load(self.module, self.optimizer, directory, scale)
        self.scaler.load_state_dict(self.scaler.state_dict() | {name: value.item() for name, value in scale.items()})

    def full_weights(self) -> dict[str, Tensor]:
        return engine_files.full_weights(self.module) if self.world.is_main else {}

    def close(self) -> None:
        super().close()
        self.accelerator.free_memory()
        AcceleratorState._reset_state()

    def _backward(self, criterion: Criterion, batches: Sequence[Mixed]) -> list[float]:
        """The losses, up to the first that is not finite."""
        losses: list[float] = []
        for batch in batches:
            with self.accelerator.accumulate(self.model):
                loss = self.forward_loss(criterion, batch)
                losses.append(self.agreed(loss))
                if not isfinite(losses[-1]):
                    self.accelerator.step = 0  # the next step begins with its first micro-batch
                    return losses
                self.accelerator.backward(self.scaler.scale(loss))
        return losses

    def _optimize(self) -> tuple[Tensor, bool]:
        """The gradient norm, and whether it is finite, so that the weights were changed."""
        self.scaler.unscale_(self.optimizer)
        norm = clip(self.model, self.options.clip_norm)
        finite = bool(norm.isfinite())
        if finite:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.model.zero_grad()
        return norm, finite

    def _lower_scale(self) -> bool:
        """Whether there is a smaller scale to try."""
        scale = self.scaler.get_scale()
        if not self.scaler.is_enabled() or scale <= LOWEST_SCALE:
            return False
        self.scaler.update(scale * self.scaler.get_backoff_factor())
        return True

    def _scale(self) -> dict[str, Tensor]:
        """The numbers of the loss scaling that change; {} where there is none."""
        state = self.scaler.state_dict()
        return {name: torch.tensor(state[name]) for name in ("scale", "_growth_tracker") if name in state}

    def _check(self) -> None:
        if self.world.size > 1 and not isinstance(self.model, nn.parallel.DistributedDataParallel):
            raise UserError(
                f"DDP over {self.world.size} ranks was asked for, but Accelerate ({self.accelerator.distributed_type}) "
                f"made a {type(self.model).__name__}: ranks would train apart; start through ds_configs/ddp_*.yaml"
            )


def accumulation_plugin(accumulation: int) -> GradientAccumulationPlugin:
    """Steps are counted by us alone, whatever loader Accelerate believes to see."""
    return GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False)


def clip(model: nn.Module, clip_norm: float) -> Tensor:
    """The global gradient norm, which clipping brings down to `clip_norm` (0: measured only)."""
    return nn.utils.clip_grad_norm_(model.parameters(), clip_norm or float("inf"))
