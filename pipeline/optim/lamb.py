"""LAMB (arXiv 1904.00962): timm's, and the same on what FSDP2 and ZeRO leave of a parameter on a rank.

ZeRO hands an optimizer flat slices of many parameters. The norm of a slice is no parameter's norm, so LAMB as it
stands would train there with other trust ratios than on one process, without a word; `place` tells it what lies where.
Under FSDP2 timm's is right as it stands, but waits for two small sums over ranks for every parameter.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import timm.optim
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


class Fragment(NamedTuple):
    """This rank's part of one parameter and of its direction, as views."""

    parameter: int
    weights: Tensor
    direction: Tensor


class Lamb(timm.optim.Lamb):
    """timm's, without the clipping of its own. All ranks of the default process group share a sharded parameter."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, max_grad_norm=None, **settings)
        self.parts: Sequence[Tensor | None] = ()

    def place(self, parts: Sequence[Tensor | None]) -> None:
        """What is moved are slices. parts: of every parameter of the model, in an order that all ranks share, this
        rank's part, a view into the slice that it lies in; None where the rank has nothing of it."""
        self.parts = parts

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """On shards and slices with one small sum over ranks."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if not self.parts and not any(isinstance(parameter, DTensor) for parameter in parameters):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moves, fragments = [], list[Fragment]()
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not moved:
                continue
            weights, directions = _local(moved), self._directions(moved, group)
            moves.append((weights, directions, group["lr"]))
            if group["weight_decay"] != 0:  # timm's adapts what decays
                fragments += self._fragments(parameters, moved, directions)
        _adapt(fragments, _local(parameters[:1])[0].new_zeros(2, len(self.parts) or len(parameters)))
        for weights, directions, lr in moves:
            torch._foreach_add_(weights, directions, alpha=-lr)
        return loss

    def _directions(self, moved: Sequence[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Adam's of what this rank holds, decay included."""
        states, gradients = [self.state[parameter] for parameter in moved], _local([p.grad for p in moved])
        for parameter, state in zip(moved, states, strict=True):
            if not state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        # Steps are a group's, as timm's; ZeRO calls the optimizer once a slice, so there they are a slice's own.
        counts = [counted.setdefault("step", torch.tensor(0.0)) for counted in (states if self.parts else [group])]
        steps = [count.add_(1).item() for count in counts] * (len(moved) // len(counts))
        beta1, beta2 = group["betas"]
        means, squares = (_local([state[name] for state in states]) for name in ("exp_avg", "exp_avg_sq"))
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        directions = torch._foreach_div(means, [1 - beta1**t for t in steps])
        denominators = torch._foreach_div(squares, [1 - beta2**t for t in steps])
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_div_(directions, denominators)
        torch._foreach_add_(directions, _local(moved), alpha=group["weight_decay"])
        return list(directions)

    def _fragments(
        self, parameters: Sequence[Tensor], moved: Sequence[Tensor], directions: Sequence[Tensor]
    ) -> list[Fragment]:
        whole = zip(_local(moved), directions, strict=True)
        if self.parts:
            return [fragment for flat, direction in whole for fragment in self._in_slice(flat, direction)]
        numbers = {id(parameter): number for number, parameter in enumerate(parameters)}
        return [Fragment(numbers[id(parameter)], *each) for parameter, each in zip(moved, whole, strict=True)]

    def _in_slice(self, flat: Tensor, direction: Tensor) -> list[Fragment]:
        first, size = flat.data_ptr(), flat.element_size()
        starts = [(i, part, (part.data_ptr() - first) // size) for i, part in enumerate(self.parts) if part is not None]
        return [
            Fragment(i, part, direction.narrow(0, start, part.numel()))
            for i, part, start in starts
            if 0 <= start < flat.numel()
        ]


def _adapt(fragments: Sequence[Fragment], squares: Tensor) -> None:
    """Scales the direction of every parameter by the parameter's norm over the direction's, over all ranks.

    squares: zeros, [2, parameters]. Of a parameter with replicas both norms count all, which their ratio does not see.
    """
    numbers = [fragment.parameter for fragment in fragments]
    directions = [fragment.direction for fragment in fragments]
    if fragments:
        norms = torch._foreach_norm([*(fragment.weights for fragment in fragments), *directions])
        squares[:, numbers] = torch.stack(norms).view(2, -1).square()
    dist.all_reduce(squares)
    weights, updates = squares.sqrt()
    ratios = torch.where((weights > 0) & (updates > 0), weights / updates, 1.0)
    if fragments:
        torch._foreach_mul_(directions, list(ratios[numbers].unbind()))


def _local(tensors: Sequence[Any]) -> list[Tensor]:
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
