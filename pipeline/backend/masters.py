"""DDP in pure bf16: the model computes with bf16 weights, the optimizer updates an fp32 copy of them."""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.backend import engine_files
from pipeline.backend.base import StepOptions
from pipeline.backend.ddp import DDP, clip
from pipeline.backend.layers import cast_inputs, prepare_layers
from pipeline.backend.world import World


class MastersDDP(DDP):
    """`masters`: the fp32 model, which is never called. Gradients are summed, over micro-batches and ranks, in bf16."""

    def __init__(
        self, world: World, masters: nn.Module, optimizer: torch.optim.Optimizer, options: StepOptions
    ) -> None:
        self.masters = masters
        computing = copy.deepcopy(masters).to(torch.bfloat16)
        cast_inputs(computing, torch.bfloat16)
        prepare_layers(computing, options.compiler, options.recompute_every)
        super().__init__(world, computing, optimizer, options)

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.masters.named_parameters() if parameter.requires_grad]

    def publish(self) -> None:
        with torch.no_grad():
            for master, computing in self._parameters():
                computing.copy_(master)

    def save_engine(self, directory: Path) -> None:
        self._keep_buffers()
        engine_files.save(self.masters, self.optimizer, directory, {})

    def stage_engine(self) -> engine_files.EngineWriter:
        self._keep_buffers()
        return engine_files.stage(self.masters, self.optimizer, {})

    def load_engine(self, directory: Path) -> None:
        engine_files.load(self.masters, self.optimizer, directory, {})
        self.publish()
        for master, computing in zip(self.masters.buffers(), self.module.buffers(), strict=True):
            computing.copy_(master)

    def full_weights(self) -> dict[str, Tensor]:
        self._keep_buffers()
        return engine_files.full_weights(self.masters) if self.world.is_main else {}

    def _optimize(self) -> tuple[Tensor, bool]:
        for master, computing in self._parameters():
            master.grad = None if computing.grad is None else computing.grad.float()
        self.model.zero_grad()
        norm = clip(self.masters, self.options.clip_norm)
        finite = bool(norm.isfinite())
        if finite:
            self.optimizer.step()
            self.publish()
        self.optimizer.zero_grad()
        return norm, finite

    def _parameters(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        return zip(self.masters.parameters(), self.module.parameters(), strict=True)

    def _keep_buffers(self) -> None:
        for master, computing in zip(self.masters.buffers(), self.module.buffers(), strict=True):
            master.copy_(computing)
