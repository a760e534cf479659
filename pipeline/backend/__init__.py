"""Strategies of distributed training behind one small object; the only place that imports accelerate or deepspeed."""

import os
from collections.abc import Callable

from torch import nn
from torch.optim import Optimizer

from pipeline.backend.base import Backend, Criterion, Mixed, StepOptions, Stepped
from pipeline.backend.world import World, start

__all__ = ["Backend", "Criterion", "Mixed", "StepOptions", "Stepped", "World", "start", "wrap"]


def wrap(
    world: World,
    model: nn.Module,
    make_optimizer: Callable[[nn.Module], Optimizer],
    micro_batch: int,
    options: StepOptions,
) -> Backend:
    """The model on the world's device under the strategy that the launch file asks for, checked to be just that.

    micro_batch: samples of one forward pass of a rank. Raises UserError where the strategy cannot be had.
    """
    model = model.to(world.device)
    if world.strategy == "fsdp":
        from pipeline.backend.fsdp import FSDP, shard

        model = shard(world, model)
        return FSDP(world, model, make_optimizer(model), options)
    if world.strategy == "deepspeed":
        from pipeline.backend.deepspeed import DeepSpeed
        from pipeline.backend.deepspeed_config import read_config

        path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        config = read_config(path, micro_batch, world.size, options)
        return DeepSpeed(world, model, make_optimizer(model), options, config)
    from pipeline.backend.ddp import DDP

    return DDP(world, model, make_optimizer(model), options)
