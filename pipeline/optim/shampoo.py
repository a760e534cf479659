"""Shampoo with Adam grafting, blocked and distributed, as the authors of ViTTM use it (arXiv 2309.06497).

Every block of a parameter has one owner among the ranks, which alone keeps its state and computes its updates. The
parameters are plain tensors (one process; or data parallel over the default process group, gradients already averaged)
or DTensors that `fully_shard` made.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from pipeline.optim.blocks import cut, deal, merge
from pipeline.optim.exchange import Exchange, holdings, rank_and_size
from pipeline.optim.precondition import Kept, accumulate, are_roots_due, directions, renew_roots


class Grafting(TypedDict, total=False):
    """Of the Adam whose lengths of steps are taken over."""

    grafting_beta2: float
    grafting_epsilon: float


@dataclass(frozen=True)
class Batch:
    """Blocks of this rank that share a parameter group and a step."""

    t: int
    settings: Mapping[str, Any]
    blocks: list[int]
    kept: list[Kept]


class Shampoo(Optimizer):
    """betas: decay rates of the gradient's mean and of the factors; weight_decay: decoupled; epsilon: added to the
    eigenvalues; max_preconditioner_dim: largest side of a factor. Updates are preconditioned from
    start_preconditioning_step on; roots are computed there, and every precondition_frequency steps after it.

    State is of the parameter's type, float32 at least; of every parameter a rank has `step`, and what belongs to the
    blocks that it owns. Raises ValueError for DTensors that are sharded otherwise than by `fully_shard`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        epsilon: float,
        weight_decay: float,
        max_preconditioner_dim: int,
        precondition_frequency: int,
        start_preconditioning_step: int,
        **grafting: Unpack[Grafting],
    ) -> None:
        unknown = sorted(set(grafting) - set(Grafting.__annotations__))
        if unknown:
            raise TypeError(f"Shampoo takes no {unknown}; of grafting it takes {sorted(Grafting.__annotations__)}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "epsilon": epsilon,
            "weight_decay": weight_decay,
            "max_preconditioner_dim": max_preconditioner_dim,
            "precondition_frequency": precondition_frequency,
            "start_preconditioning_step": start_preconditioning_step,
            "grafting_beta2": grafting.get("grafting_beta2", 0.999),
            "grafting_epsilon": grafting.get("grafting_epsilon", 1e-8),
        }
        super().__init__(params, defaults)
        self._deal()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._deal()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """While the optimizer is made, for blocks are dealt to ranks once. Raises RuntimeError later."""
        if hasattr(self, "exchange"):
            raise RuntimeError("Shampoo deals blocks to ranks once, when it is made: give it all groups there")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state that is wider than its parameter stays so."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for parameter, number in zip(self.parameters, numbers, strict=True):
            state = self.state[parameter]
            for name, value in state_dict["state"].get(number, {}).items():
                if value.dtype != state[name].dtype:
                    state[name] = value.to(state[name].device, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rows = self.gradient_rows()
        gradients = self.exchange.collect(rows)
        updates: dict[int, Tensor] = {}
        for batch in self.advance():
            accumulate([gradients[block] for block in batch.blocks], batch.kept, batch.settings)
            if are_roots_due(batch.t, batch.settings):
                renew_roots(batch.kept, batch.t, batch.settings)
            updates |= zip(batch.blocks, directions(batch.kept, batch.t, batch.settings), strict=True)
        idle = {block: torch.zeros_like(gradients[block]) for block in gradients.keys() - updates.keys()}
        self.apply(self.exchange.deliver(updates | idle, rows))
        return loss

    def gradient_rows(self) -> list[Tensor]:
        """Of every parameter the gradient of what this rank holds, in rows of the merged parameter; zeros for none."""
        found = []
        for parameter, merged, rows in zip(self.parameters, self.merged, self.exchange.rows, strict=True):
            local = _local(parameter if parameter.grad is None else parameter.grad)
            local = torch.zeros_like(local) if parameter.grad is None else local
            found.append(local.reshape(len(rows), *merged[1:]))
        return found

    def advance(self) -> list[Batch]:
        """Counts a step of every parameter that has a gradient; this rank's blocks of these."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                self.state[parameter].setdefault("step", torch.tensor(0.0)).add_(1)
        batches: dict[tuple[int, int], Batch] = {}
        for i in self.owned:
            parameter = self.parameters[self.blocks[i].parameter]
            if parameter.grad is None:
                continue
            group, t = self.group_of[self.blocks[i].parameter], int(self.state[parameter]["step"].item())
            batch = batches.setdefault((group, t), Batch(t, self.param_groups[group], [], []))
            batch.blocks.append(i)
            batch.kept.append(self._kept(i, parameter))
        return list(batches.values())

    def apply(self, updates: list[Tensor]) -> None:
        """Step 5, on what this rank holds: p <- p - lr (u + weight_decay p)."""
        for number, group in enumerate(self.param_groups):
            chosen = [
                (_local(parameter), update)
                for parameter, update, mine in zip(self.parameters, updates, self.group_of, strict=True)
                if mine == number and parameter.grad is not None and update.numel()
            ]
            if chosen:
                tensors = [tensor for tensor, _ in chosen]
                moves = [update.view(tensor.shape) for tensor, update in chosen]
                torch._foreach_add_(moves, tensors, alpha=group["weight_decay"])
                torch._foreach_add_(tensors, moves, alpha=-float(group["lr"]))

    def _deal(self) -> None:
        """Cuts all parameters into blocks and gives each an owner: the same on every rank."""
        groups = self.param_groups
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.group_of = [number for number, group in enumerate(groups) for _ in group["params"]]
        largest = [groups[number]["max_preconditioner_dim"] for number in self.group_of]
        self.merged = [merge(parameter.shape, most) for parameter, most in zip(self.parameters, largest, strict=True)]
        self.blocks = [block for i, most in enumerate(largest) for block in cut(i, self.merged[i], most)]
        rank, world = rank_and_size()
        owners = deal([block.cost for block in self.blocks], world)
        self.owned = [i for i, owner in enumerate(owners) if owner == rank]
        held = [holdings(parameter, merged) for parameter, merged in zip(self.parameters, self.merged, strict=True)]
        dtype = functools.reduce(torch.promote_types, (p.dtype for p in self.parameters), torch.float32)
        self.exchange = Exchange(
            self.blocks, owners, held, torch.empty(0, dtype=dtype, device=self.parameters[0].device)
        )

    def _kept(self, i: int, parameter: Tensor) -> Kept:
        """The state of block i, made where there is none."""
        block, state = self.blocks[i], self.state[parameter]
        prefix = f"block_{block.name}"
        if f"{prefix}_exp_avg" not in state:
            like = torch.empty(0, dtype=torch.promote_types(parameter.dtype, torch.float32), device=parameter.device)
            for a, side in enumerate(block.shape):
                state[f"{prefix}_factor_{a}"] = like.new_zeros(side, side)
                state[f"{prefix}_root_{a}"] = torch.eye(side, dtype=like.dtype, device=like.device)
            state[f"{prefix}_exp_avg"] = like.new_zeros(block.shape)
            state[f"{prefix}_exp_avg_sq"] = like.new_zeros(block.shape)
        sides = range(len(block.shape))
        return Kept(
            prefix,
            [state[f"{prefix}_factor_{a}"] for a in sides],
            [state[f"{prefix}_root_{a}"] for a in sides],
            state[f"{prefix}_exp_avg"],
            state[f"{prefix}_exp_avg_sq"],
        )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
