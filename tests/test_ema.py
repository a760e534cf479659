"""The average of the weights."""

import pytest
import torch
from torch import nn

from pipeline.ema import EMA
from pipeline.sharded import Shard


@pytest.fixture
def model() -> nn.Module:
    return nn.Linear(3, 2)


class Whole:
    """A backend whose rank holds the whole model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def shards(self) -> list[Shard]:
        named = self.model.named_parameters()
        return [Shard(name, parameter.detach().view(-1), 0, parameter.numel()) for name, parameter in named]

    averaged = shards

    def publish(self) -> None:
        """The model computes with the pieces themselves."""


def tensors(shards: list[Shard]) -> dict[str, torch.Tensor]:
    return {shard.name: shard.tensor.clone() for shard in shards}


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return tensors(Whole(model).shards())


def test_the_first_update_copies_and_later_ones_average(model):
    ema = EMA(Whole(model), 0.9)
    ema.update()
    torch.testing.assert_close(tensors(ema.shards), parameters(model), rtol=0, atol=0)
    before = tensors(ema.shards)
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.update()
    torch.testing.assert_close(tensors(ema.shards), {"weight": before["weight"] + 0.1, "bias": before["bias"]})


def test_swapping_lends_the_averages_to_the_model(model):
    ema = EMA(Whole(model), 0.9)
    raw = parameters(model)
    with ema.swap():
        assert all(not parameter.any() for parameter in model.parameters())
        with pytest.raises(AssertionError, match="swapped into the model"):
            ema.state()
    torch.testing.assert_close(parameters(model), raw, rtol=0, atol=0)


def test_an_error_while_swapped_still_puts_the_weights_back(model):
    ema = EMA(Whole(model), 0.9)
    raw = model.weight.detach().clone()
    with pytest.raises(ZeroDivisionError), ema.swap():
        raise ZeroDivisionError
    assert torch.equal(model.weight, raw)
    assert ema.state() is ema.shards
