"""Exponential moving average of the weights, kept piece by piece beside what the optimizer updates."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pipeline.sharded import Shard


class Engine(Protocol):
    """The part of a Backend that is needed here."""

    def averaged(self) -> list[Shard]: ...
    def publish(self) -> None: ...


class EMA:
    """average <- decay * average + (1 - decay) * weights, after every optimizer step; the first update copies.

    Each rank averages the pieces that it holds of the fp32 weights, and, as timm does, what batch norms have seen.
    Nothing is ever gathered.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self.engine = engine
        self.shards = [
            dataclasses.replace(shard, tensor=torch.zeros_like(shard.tensor)) for shard in self.engine.averaged()
        ]
        self.num_updates = 0
        self.swapped = False
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        averages, weights = self._pairs()
        if self.num_updates == 0:
            torch._foreach_copy_(averages, weights)
        else:
            self._average(averages, weights, self.num_updates)
        self.num_updates += 1

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Within, the model computes with the average, in place."""
        self._exchange()
        self.swapped = True
        try:
            yield
        finally:
            self._exchange()
            self.swapped = False

    def state(self) -> list[Shard]:
        """The averages to save, or to load into in place; never while they are swapped into the model."""
        assert not self.swapped, "the average is swapped into the model: what is called average now are raw weights"
        return self.shards

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, weight in zip(*self._pairs(), strict=True):
            kept = average.clone()
            average.copy_(weight)
            weight.copy_(kept)
        self.engine.publish()

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """The averages that this rank holds, and the weights that they follow."""
        weights = self.engine.averaged()
        return [shard.tensor for shard in self.shards if len(shard.tensor)], [
            shard.tensor for shard in weights if len(shard.tensor)
        ]
