"""Gradient norms of single parameters, wherever a strategy keeps their pieces."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from pipeline.backend import Backend


class GradientNorms:
    """The norm of the last step's gradient of every trainable parameter, before clipping, by its name.

    The optimizer itself is watched, when it is about to step: what it is given has a gradient under every strategy, and
    shares its memory with the backend's `shards()`. Nothing is gathered.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._squares: dict[str, Tensor] = {}
        backend.stepping.register_step_pre_hook(self._look)

    def read(self, total: float) -> dict[str, float]:
        """{"grad_norm/NAME": ..}; every rank calls it. `total` is the norm of all of them before clipping: what is seen
        at the step is clipped, so that all are scaled to it."""
        shards = self._backend.shards()
        seen = dict(zip(self._squares, torch.stack([*self._squares.values()]).tolist(), strict=True))
        squares = [seen.get(shard.name, 0.0) for shard in shards]
        found = self._backend.world.sum([*squares, *(len(shard.tensor) for shard in shards)])
        copies = [held / shard.numel for shard, held in zip(shards, found[len(shards) :], strict=True)]
        norms = [(square / held) ** 0.5 for square, held in zip(found, copies, strict=False)]
        scale = total / max(sum(norm**2 for norm in norms) ** 0.5, torch.finfo(torch.float64).tiny)
        return {f"grad_norm/{shard.name}": norm * scale for shard, norm in zip(shards, norms, strict=True)}

    @torch.no_grad()
    def _look(self, optimizer: Optimizer, arguments: Any, keywords: Any) -> None:
        """ZeRO calls the optimizer once for a part of the parameters after the other."""
        given: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for parameter in (
            each for group in optimizer.param_groups for each in group["params"] if each.grad is not None
        ):
            updated = _local(parameter)
            given.setdefault(_memory(updated), []).append((updated, _local(parameter.grad).reshape(-1)))
        for shard in self._backend.shards():
            for updated, gradient in given.get(_memory(shard.tensor), []):
                start = shard.tensor.storage_offset() - updated.storage_offset()
                if 0 <= start < updated.numel():
                    self._squares[shard.name] = gradient[start : start + len(shard.tensor)].double().square().sum()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
