"""The layers of a model: the unit of sharding, of compilation and of activation checkpointing."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

GRAPHS_A_LAYER = 4  # in training and in evaluation, with gradients and without


def layers(model: nn.Module) -> list[nn.Module]:
    """The items of the model's longest list of modules."""
    stacks = [child for child in model.children() if isinstance(child, nn.ModuleList | nn.Sequential)]
    return list(max(stacks, key=len)) if stacks else []


def prepare_layers(model: nn.Module, compiler: str, recompute_every: int) -> None:
    """In place, and before the model is wrapped: names of parameters stay.

    compiler: a backend of torch.compile, for each layer alone, or "off". recompute_every: every so-manieth layer's
    activations are dropped, and computed again in the backward pass; 0 keeps all.
    """
    found = layers(model)
    for layer in found[::recompute_every] if recompute_every else []:
        _recompute(layer)
    if compiler != "off":
        _compile(found, compiler)


def cast_inputs(model: nn.Module, dtype: torch.dtype) -> None:
    """Whoever calls the model, its inputs come to it as `dtype`."""

    def cast(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(tensor.to(dtype) for tensor in inputs)

    model.register_forward_pre_hook(cast)


def _recompute(layer: nn.Module) -> None:
    whole = layer.forward

    def forward(*inputs: Any) -> Any:  # a function of ours: a partial of `checkpoint` would switch compilation off
        return checkpoint(whole, *inputs, use_reentrant=False)

    layer.forward = forward


def _compile(found: list[nn.Module], compiler: str) -> None:
    """Layers whose constants differ get graphs of their own; beyond dynamo's limit it would run the rest uncompiled."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, GRAPHS_A_LAYER * len(found))
    config.fail_on_recompile_limit_hit = True
    for layer in found:
        layer.compile(backend=compiler)
