"""Running means and variances of batch norms: the part of a model that no optimizer updates, and every rank has."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pipeline.backend.world import World
from pipeline.sharded import Shard


class Statistics:
    """Those of a model; nothing where it has none, or keeps none."""

    def __init__(self, module: nn.Module) -> None:
        norms = [(name, norm) for name, norm in module.named_modules() if isinstance(norm, _NormBase)]
        kept = [(name, norm) for name, norm in norms if norm.track_running_stats]
        self.named = [(f"{name}.{kind}", norm, kind) for name, norm in kept for kind in ("running_mean", "running_var")]

    def tensors(self) -> list[Tensor]:
        return [getattr(norm, kind) for _, norm, kind in self.named]

    def shards(self) -> list[Shard]:
        """Each whole, on every rank; what is written into them the model computes with."""
        pairs = zip(self.named, self.tensors(), strict=True)
        return [Shard(name, tensor.view(-1), 0, tensor.numel()) for (name, _, _), tensor in pairs]

    def copy(self) -> list[Tensor]:
        return [tensor.clone() for tensor in self.tensors()]

    def settle(self, before: Sequence[Tensor], applied: bool, world: World) -> None:
        """After a step: where it was not applied, they are as `before`, for what it saw may not be finite. Otherwise
        rank 0's are all ranks', as DDP has it before each forward pass: an evaluation must not depend on the rank that
        an image falls to."""
        if not before:
            return
        tensors = self.tensors()
        if not applied:
            torch._foreach_copy_(tensors, list(before))
        elif world.size > 1:
            whole = world.broadcast(torch.cat([tensor.flatten() for tensor in tensors]))
            parts = whole.split([tensor.numel() for tensor in tensors])
            torch._foreach_copy_(tensors, [part.view_as(own) for part, own in zip(parts, tensors, strict=True)])
