"""The arithmetic of Shampoo (arXiv 2309.06497) on one batch of blocks that share settings and step.

o is the number of dimensions of a block, n the side of one of them, t the step, counted from 1.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NORM_EPSILON = 1e-16


@dataclass(frozen=True)
class Kept:
    """The state of one block: for every dimension a factor and its inverse root, [n, n], and both moments."""

    name: str
    factors: list[Tensor]
    roots: list[Tensor]
    exp_avg: Tensor
    exp_avg_sq: Tensor


def accumulate(gradients: Sequence[Tensor], kept: Sequence[Kept], settings: Mapping[str, Any]) -> None:
    """Step 2 of the algorithm, and the first moment of step 4: what is averaged over gradients."""
    beta1, beta2 = settings["betas"]
    gradients = [gradient.to(block.exp_avg.dtype) for gradient, block in zip(gradients, kept, strict=True)]
    grafting_beta2 = settings["grafting_beta2"]
    for gradient, block in zip(gradients, kept, strict=True):
        for a, factor in enumerate(block.factors):
            rows = gradient.movedim(a, 0).flatten(1) if gradient.ndim > 1 else gradient[:, None]
            factor.addmm_(rows, rows.T, beta=beta2, alpha=1 - beta2)
    first, second = _moments(kept)
    torch._foreach_lerp_(first, gradients, 1 - beta1)
    torch._foreach_mul_(second, grafting_beta2)
    torch._foreach_addcmul_(second, gradients, gradients, value=1 - grafting_beta2)


def are_roots_due(t: int, settings: Mapping[str, Any]) -> bool:
    start, frequency = settings["start_preconditioning_step"], settings["precondition_frequency"]
    return t == start or (t > start and t % frequency == 0)


def renew_roots(kept: Sequence[Kept], t: int, settings: Mapping[str, Any]) -> None:
    """Step 3. A root whose factor cannot be decomposed stays as it is, with a warning."""
    correction = 1 - settings["betas"][1] ** t
    for block in kept:
        for a, (factor, root) in enumerate(zip(block.factors, block.roots, strict=True)):
            found = inverse_root(factor / correction, 2 * len(block.factors), settings["epsilon"])
            if found is not None:
                root.copy_(found)
                continue
            warnings.warn(
                f"Shampoo cannot decompose factor {a} of {block.name} at step {t}, not in float64 either: it goes on "
                "with the root that it has",
                stacklevel=2,
            )


def inverse_root(matrix: Tensor, order: int, epsilon: float) -> Tensor | None:
    """matrix^(-1/order) of a symmetric [n, n], its eigenvalues shifted up to 0 where one is negative, plus epsilon;
    None where the decomposition fails in its own dtype and in float64."""
    for dtype in (matrix.dtype, torch.float64):
        try:
            values, vectors = torch.linalg.eigh(matrix.to(dtype))
        except torch.linalg.LinAlgError:
            continue
        values = values - values.min().clamp(max=0) + epsilon
        root = (vectors * values.pow(-1 / order)) @ vectors.T
        if root.isfinite().all():
            return root.to(matrix.dtype)
    return None


def directions(kept: Sequence[Kept], t: int, settings: Mapping[str, Any]) -> list[Tensor]:
    """Step 4: the update of each block, before weight decay and learning rate."""
    first, second = _moments(kept)
    means = torch._foreach_div(first, 1 - settings["betas"][0] ** t)
    denominators = torch._foreach_div(second, 1 - settings["grafting_beta2"] ** t)
    torch._foreach_sqrt_(denominators)
    torch._foreach_add_(denominators, settings["grafting_epsilon"])
    grafts = torch._foreach_div(means, denominators)
    if t < settings["start_preconditioning_step"]:
        return list(grafts)
    found = [precondition(mean, block.roots) for mean, block in zip(means, kept, strict=True)]
    norms = torch._foreach_norm(found)
    torch._foreach_add_(norms, NORM_EPSILON)
    torch._foreach_mul_(found, torch._foreach_div(torch._foreach_norm(grafts), norms))
    return found


def precondition(tensor: Tensor, roots: Sequence[Tensor]) -> Tensor:
    """The tensor contracted with one [n, n] root along each of its dimensions."""
    for root in roots:  # each turn contracts the first dimension, and puts it last
        tensor = torch.tensordot(tensor, root, dims=([0], [0]))
    return tensor


def _moments(kept: Sequence[Kept]) -> tuple[list[Tensor], list[Tensor]]:
    return [block.exp_avg for block in kept], [block.exp_avg_sq for block in kept]
