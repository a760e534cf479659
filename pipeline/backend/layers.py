"""The layers of a model: the unit of sharding, of compilation and of activation checkpointing."""

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def layers(model: nn.Module) -> list[nn.Module]:
    """The items of the model's longest list of modules."""
    stacks = [child for child in model.children() if isinstance(child, nn.ModuleList | nn.Sequential)]
    return list(max(stacks, key=len)) if stacks else []


def prepare_layers(model: nn.Module, compiler: str, recompute_every: int) -> None:
    """In place, and before the model is wrapped: names of parameters stay.

    compiler: a backend of torch.compile, or "off"; each layer is compiled alone, with the same code. recompute_every:
    the activations of every so-manieth layer are dropped, and computed again in the backward pass; 0 keeps all.
    """
    found = layers(model)
    for layer in found[::recompute_every] if recompute_every else []:
        _recompute(layer)
    for layer in found if compiler != "off" else []:
        layer.compile(backend=compiler)


def _recompute(layer: nn.Module) -> None:
    whole = layer.forward

    def forward(*inputs: Any) -> Any:  # a function of ours: a partial of `checkpoint` switches compilation off
        return checkpoint(whole, *inputs, use_reentrant=False)

    layer.forward = forward
