"""The average of the weights."""

import pytest
import torch
from torch import nn

from pipeline.ema import EMA


@pytest.fixture
def model() -> nn.Module:
    return nn.Linear(3, 2)


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_the_first_update_copies_and_later_ones_average(model):
    ema = EMA(parameters(model), 0.9)
    ema.update()
    torch.testing.assert_close(ema.averages, parameters(model), rtol=0, atol=0)
    before = {name: average.clone() for name, average in ema.averages.items()}
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.update()
    torch.testing.assert_close(ema.averages["weight"], before["weight"] + 0.1)
    torch.testing.assert_close(ema.averages["bias"], before["bias"])


def test_swapping_lends_the_averages_to_the_model(model):
    ema = EMA(parameters(model), 0.9)
    raw = {name: parameter.clone() for name, parameter in parameters(model).items()}
    with ema.swap():
        assert all(not parameter.any() for parameter in model.parameters())
        with pytest.raises(AssertionError, match="swapped into the model"):
            ema.state()
    torch.testing.assert_close(parameters(model), raw, rtol=0, atol=0)


def test_an_error_while_swapped_still_puts_the_weights_back(model):
    ema = EMA(parameters(model), 0.9)
    raw = model.weight.detach().clone()
    with pytest.raises(ZeroDivisionError), ema.swap():
        raise ZeroDivisionError
    assert torch.equal(model.weight, raw)
    assert ema.state() is ema.averages
