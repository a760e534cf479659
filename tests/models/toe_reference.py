"""Token expansion as the specification words it: one sample after the other, one token after the other."""

from collections.abc import Sequence

import torch
from torch import Tensor

Likenesses = list[list[float]]


def likenesses(patches: Tensor, distance: str) -> Likenesses:
    """Of every two of the tokens (N, D); the larger the more alike."""
    unit = patches / patches.norm(dim=1, keepdim=True)
    if distance == "cosine":
        return (unit[:, None] * unit[None]).sum(dim=2).tolist()
    apart = unit[:, None] - unit[None]
    return (-apart.abs().sum(dim=2) if distance == "manhattan" else -apart.square().sum(dim=2).sqrt()).tolist()


def added(num: int, rates: Sequence[float], first: float, stage: int) -> int:
    """Tokens that `stage`, from 1, adds."""
    before = [first, *rates]  # the rate before stage t is number t - 1
    if stage < len(rates):
        return int(num * (rates[stage - 1] - before[stage - 1]))
    earlier = sum(rates[t - 1] - before[t - 1] for t in range(1, stage))
    return int(num * rates[-1]) - int(num * (first + earlier))


def select(alike: Likenesses, rates: Sequence[float], first: float, repetitions: int, stage: int) -> list[int]:
    """The selected tokens, in their order."""
    num = len(alike)
    selected = list(range(0, num, int(1 // first)))[: int(num * first)]
    for number in range(1, stage + 1):
        total = added(num, rates, first, number)
        each = total // repetitions
        for size in [each] * (repetitions - 1) + [total - each * (repetitions - 1)]:
            others = [token for token in range(num) if token not in selected]
            scores = [max(alike[token][kept] for kept in selected) for token in others]
            order = sorted(range(len(others)), key=scores.__getitem__)  # stable
            selected = selected + [others[place] for place in order[:size]]
    return selected


def merge(patches: Tensor, alike: Likenesses, selected: list[int]) -> Tensor:
    """(N, D) -> (K, D)."""
    groups = {kept: [kept] for kept in selected}
    for token in range(len(patches)):
        if token not in selected:
            groups[max(selected, key=alike[token].__getitem__)].append(token)
    return torch.stack([patches[groups[kept]].mean(dim=0) for kept in selected])
