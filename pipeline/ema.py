"""Exponential moving average of the weights, kept shard by shard beside the parameters it follows."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA:
    """average <- decay * average + (1 - decay) * weights, after every optimizer step; the first update copies.

    parameters: name -> tensor that shares the parameter's storage, whole or a DTensor. Nothing is ever gathered.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.parameters = dict(parameters)
        self.averages = {name: torch.zeros_like(parameter) for name, parameter in self.parameters.items()}
        self.num_updates = 0
        self.swapped = False
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        averages, parameters = _local(self.averages), _local(self.parameters)
        if self.num_updates == 0:
            torch._foreach_copy_(averages, parameters)
        else:
            self._average(averages, parameters, self.num_updates)
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

    def state(self) -> dict[str, Tensor]:
        """The averages to save, or to load into in place; never while they are swapped into the model."""
        assert not self.swapped, "the average is swapped into the model: what is called average now are raw weights"
        return self.averages

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, parameter in zip(_local(self.averages), _local(self.parameters), strict=True):
            kept = average.clone()
            average.copy_(parameter)
            parameter.copy_(kept)


def _local(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors.values()]
