"""FSDP2: parameters, gradients and optimizer states in shards, by torch's `fully_shard`, on CPU and GPU alike."""

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from pipeline.backend import engine_files
from pipeline.backend.base import Backend, Criterion, Mixed, StepOptions, Stepped, mean, skipped
from pipeline.backend.ddp import clip
from pipeline.backend.layers import layers
from pipeline.backend.world import World
from pipeline.sharded import Shard
from shards.errors import UserError


class FSDP(Backend):
    """Layers are gathered one at a time; gradients are reduced in the last micro-batch's backward pass."""

    @property
    def name(self) -> str:
        return "fsdp"

    def _step(self, criterion: Criterion, batches: Sequence[Mixed]) -> Stepped:
        losses: list[float] = []
        for position, batch in enumerate(batches, start=1):
            self._synchronise(position == len(batches))
            loss = self.forward_loss(criterion, batch)
            losses.append(self.agreed(loss))
            if not isfinite(losses[-1]):
                self._drop(loss, summed=position > 1)
                return skipped(losses)
            (loss / len(batches)).backward()
        norm = cast(DTensor, clip(self.model, self.options.clip_norm)).full_tensor()
        applied = bool(norm.isfinite())
        if applied:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return Stepped(mean(losses), norm, applied)

    def shards(self) -> list[Shard]:
        return [_shard(name, cast(DTensor, parameter.detach())) for name, parameter in self.trained()]

    def save_engine(self, directory: Path) -> None:
        engine_files.save(self.model, self.optimizer, directory, {})

    def stage_engine(self) -> engine_files.EngineWriter:
        return engine_files.stage(self.model, self.optimizer, {})

    def load_engine(self, directory: Path) -> None:
        engine_files.load(self.model, self.optimizer, directory, {})

    def full_weights(self) -> dict[str, Tensor]:
        return engine_files.full_weights(self.model)

    def _drop(self, loss: Tensor, summed: bool) -> None:
        """Forgets what earlier micro-batches summed: FSDP2 lets go of it only in a backward pass that reduces it."""
        if summed:
            self._synchronise(True)
            loss.backward()
        self.optimizer.zero_grad()

    def _synchronise(self, gradients: bool) -> None:
        cast(FSDPModule, self.model).set_requires_gradient_sync(gradients)


def _shard(name: str, parameter: DTensor) -> Shard:
    """Rows of dim 0, which lie one after the other."""
    (chunk,) = parameter.__create_chunk_list__()  # also of (replicate, shard) meshes: where the local rows begin
    row = parameter.numel() // parameter.shape[0]
    return Shard(name, parameter.to_local().view(-1), chunk.offsets[0] * row, parameter.numel())


def shard(world: World, model: nn.Module, options: StepOptions) -> nn.Module:
    """The model with every layer, and then the rest, sharded over a replica's ranks; before the optimizer is built.

    Neighbouring ranks make a replica, so that shards travel within a machine and gradients alone between machines. In
    pure bf16 what is gathered is bf16, while shards and reduced gradients stay fp32. Raises UserError where the model's
    parameters are not what FSDP2 makes of them.
    """
    mesh = make_mesh(world, options.replicas)
    pure = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = pure if options.precision == "bf16-pure" else MixedPrecisionPolicy()
    for layer in layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # Without this the root stays gathered after evaluation, and swapped-in averages would not reach it.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    other = [name for name, parameter in model.named_parameters() if getattr(parameter, "device_mesh", None) != mesh]
    if other or not isinstance(model, FSDPModule):
        raise UserError(
            f"FSDP2 over {world.size} ranks was asked for, but {len(other)} parameters are not sharded "
            f"(first: {other[:3]}): this is no model that fully_shard can take; start through ds_configs/ddp_*.yaml"
        )
    return model


def make_mesh(world: World, replicas: int) -> DeviceMesh:
    if replicas == 1:
        return init_device_mesh(world.device.type, (world.size,))
    shape, names = (replicas, world.size // replicas), ("replicate", "shard")
    return init_device_mesh(world.device.type, shape, mesh_dim_names=names)
