"""Strategies of distributed training behind one small object; the only place that imports accelerate or deepspeed."""

import os
from collections.abc import Callable

from torch import nn
from torch.optim import Optimizer

from pipeline.backend.base import Backend, Criterion, Mixed, StepOptions, Stepped, autocast
from pipeline.backend.layers import cast_inputs, prepare_layers
from pipeline.backend.place import Place
from pipeline.backend.stop import STOP_SIGNALS, StopFlag, Stopped
from pipeline.backend.toolchain import check_toolchain, mend_compile_cache
from pipeline.backend.world import TIMEOUT, World, start
from shards.errors import UserError

__all__ = [
    "STOP_SIGNALS",
    "TIMEOUT",
    "Backend",
    "Criterion",
    "Mixed",
    "Place",
    "StepOptions",
    "Stepped",
    "StopFlag",
    "Stopped",
    "World",
    "autocast",
    "cast_inputs",
    "start",
    "wrap",
]


def wrap(
    world: World,
    model: nn.Module,
    make_optimizer: Callable[[nn.Module], Optimizer],
    options: StepOptions,
) -> Backend:
    """The model on the world's device under the strategy that the launch file asks for, checked to be just that.

    Raises UserError where the strategy cannot be had.
    """
    check_options(world, options)
    model = model.to(world.device)
    if world.strategy == "ddp":
        return _wrap_ddp(world, model, make_optimizer, options)
    prepare_layers(model, options.compiler, options.recompute_every)
    if world.strategy == "fsdp":
        from pipeline.backend.fsdp import FSDP, shard

        model = shard(world, model, options)
        return FSDP(world, model, make_optimizer(model), options)
    from pipeline.backend.deepspeed import DeepSpeed
    from pipeline.backend.deepspeed_config import read_config

    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    config = read_config(path, world.size, options)
    return DeepSpeed(world, model, make_optimizer(model), options, config)


def _wrap_ddp(
    world: World, model: nn.Module, make_optimizer: Callable[[nn.Module], Optimizer], options: StepOptions
) -> Backend:
    if options.precision == "bf16-pure":
        from pipeline.backend.masters import MastersDDP

        return MastersDDP(world, model, make_optimizer(model), options)
    from pipeline.backend.ddp import DDP

    prepare_layers(model, options.compiler, options.recompute_every)
    return DDP(world, model, make_optimizer(model), options)


def check_options(world: World, options: StepOptions) -> None:
    """Raises UserError for what this strategy, this number of ranks or this machine cannot do."""
    if options.precision == "fp16" and world.strategy != "ddp":
        raise UserError(
            f"runtime.precision fp16 is for DDP alone, but the launch file asks for {world.strategy}: give "
            "--runtime.precision bf16, or start through ds_configs/ddp_*.yaml"
        )
    if options.compiler == "inductor" and world.device.type == "cpu":
        check_toolchain("torch.compile's inductor", ("g++",))
        mend_compile_cache()
    check_replicas(world, options.replicas)


def check_replicas(world: World, replicas: int) -> None:
    if replicas > 1 and world.strategy != "fsdp":
        raise UserError(
            f"runtime.fsdp_replicas {replicas} asks for a mesh of FSDP2, but the launch file asks for "
            f"{world.strategy}: start through ds_configs/fsdp_*.yaml, or leave it at 1"
        )
    if world.size % replicas:
        fitting = [count for count in range(1, world.size + 1) if world.size % count == 0]
        raise UserError(
            f"runtime.fsdp_replicas {replicas} does not divide the {world.size} ranks: each replica is a group of "
            f"equally many ranks that share one copy of the model; give one of {fitting}"
        )
