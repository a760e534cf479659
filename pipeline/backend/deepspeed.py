"""DeepSpeed's ZeRO through Accelerate: optimizer states (1), gradients (2) and weights (3) in partitions."""

from collections.abc import Sequence
from math import isfinite
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn

from pipeline.backend import universal, zero
from pipeline.backend.base import Backend, Criterion, Mixed, StepOptions, Stepped, mean, skipped
from pipeline.backend.ddp import accumulation_plugin
from pipeline.backend.layers import cast_inputs
from pipeline.backend.toolchain import build_kernel, check_toolchain
from pipeline.backend.world import World
from pipeline.sharded import Shard
from shards.errors import UserError

TAG = "engine"


class DeepSpeed(Backend):
    """`accelerator.backward` steps the engine in the last micro-batch, clipping included."""

    def __init__(
        self, world: World, model: nn.Module, optimizer: torch.optim.Optimizer, options: StepOptions, config: dict
    ) -> None:
        if world.device.type == "cpu":
            check_toolchain("DeepSpeed", ("g++", "ninja"))
        for name in kernels(world, config):
            build_kernel(name)
        self.accelerator = Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
            mixed_precision="no",
            gradient_accumulation_plugin=accumulation_plugin(options.accumulation),
        )
        if options.precision == "bf16-pure":
            cast_inputs(model, torch.bfloat16)
        self.engine, wrapped = self.accelerator.prepare(model, optimizer)
        super().__init__(world, self.engine, wrapped.optimizer, options)
        self._check(config)
        zero.share(self.engine)
        if hasattr(optimizer, "place"):
            optimizer.place([shard.tensor if len(shard.tensor) else None for shard in self.shards()])

    @property
    def name(self) -> str:
        return f"zero{self.engine.zero_optimization_stage()}"

    @property
    def stepping(self) -> torch.optim.Optimizer:
        return self.engine.basic_optimizer

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    def _step(self, criterion: Criterion, batches: Sequence[Mixed]) -> Stepped:
        losses: list[float] = []
        for batch in batches:
            with self.accelerator.accumulate(self.model):
                loss = self.forward_loss(criterion, batch)
                losses.append(self.agreed(loss))
                if isfinite(losses[-1]):
                    self.accelerator.backward(loss)
            if not isfinite(losses[-1]):
                self._drop(loss, summed=len(losses) > 1)
                return skipped(losses)
        norm = torch.as_tensor(self.engine.get_global_grad_norm())
        return Stepped(mean(losses), norm, self.engine.was_step_applied())

    def shards(self) -> list[Shard]:
        return [zero.shard_of(name, parameter, self.engine) for name, parameter in self.trained()]

    def publish(self) -> None:
        zero.publish(self.engine)

    def num_parameters(self) -> int:
        return sum(zero.num_elements(parameter) for parameter in self.module.parameters())

    def save_engine(self, directory: Path) -> None:
        """DeepSpeed's own pickles: read back only from a committed directory whose hashes match."""
        try:
            self.engine.save_checkpoint(directory, tag=TAG, save_latest=False)
        except RuntimeError as error:  # what torch.save's writer makes of a write that failed
            raise OSError(f"DeepSpeed's save_checkpoint: {error}") from error

    def load_engine(self, directory: Path) -> None:
        saved = directory / TAG
        if universal.num_partitions(saved) == self.world.size:
            self.engine.load_checkpoint(directory, tag=TAG)
        else:
            checkpoint = directory.parent
            universal.load(self.engine, self.world, saved, checkpoint.with_name(f"{checkpoint.name}.universal.tmp"))

    def full_weights(self) -> dict[str, Tensor]:
        return zero.full_weights(self.engine)

    def close(self) -> None:
        super().close()
        self.engine.destroy()
        self.accelerator.free_memory()
        AcceleratorState._reset_state()

    def _drop(self, loss: Tensor, summed: bool) -> None:
        """Forgets what earlier micro-batches summed: on every rank the engine is made to see that they are not finite,
        and to do as it does then."""
        if summed:
            self.accelerator.deepspeed_engine_wrapped.backward(loss * float("nan"), sync_gradients=True)
            assert not self.engine.was_step_applied(), "DeepSpeed applied gradients that are not finite"
        self.accelerator.step = 0  # the next step begins with its first micro-batch

    def _check(self, config: dict) -> None:
        stage = config["zero_optimization"]["stage"]
        engine = self.engine
        if not hasattr(engine, "zero_optimization_stage"):
            raise UserError(f"DeepSpeed was asked for, but Accelerate made a {type(engine).__name__}: {REMEDY}")
        if (engine.zero_optimization_stage(), engine.world_size) != (stage, self.world.size):
            raise UserError(
                f"ZeRO stage {stage} over {self.world.size} ranks was asked for, but DeepSpeed runs stage "
                f"{engine.zero_optimization_stage()} over {engine.world_size}: {REMEDY}"
            )
        trained = sum(zero.num_elements(parameter) for _, parameter in self.trained())
        (held,) = self.world.sum([sum(len(shard.tensor) for shard in self.shards())])
        if held != trained:
            raise UserError(
                f"ZeRO stage {stage} over {self.world.size} ranks was asked for, but together they update {held:.0f} "
                f"elements of {trained}: not every weight is in one rank's partition; take ds_configs/zero{stage}.json"
            )


def kernels(world: World, config: dict) -> list[str]:
    """The builders of what DeepSpeed, or Accelerate for it, compiles at first use."""
    offloads = config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
    adam = offloads and config.get("zero_force_ds_cpu_optimizer", True)
    collectives = world.device.type == "cpu"
    return ["ShareMemCommBuilder"] * collectives + ["CPUAdamBuilder"] * adam


REMEDY = "the launch did not reach DeepSpeed; start through ds_configs/zero*.yaml"
