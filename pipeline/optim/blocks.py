"""How Shampoo cuts parameters into blocks, and which rank owns which block."""

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """A part of a merged parameter that is preconditioned alone.

    parameter: its place among the optimizer's; name: its place in the grid of blocks; slices: of each merged dimension.
    """

    parameter: int
    name: str
    slices: tuple[slice, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(part.stop - part.start for part in self.slices)

    @property
    def rows(self) -> range:
        """Of the merged parameter's first dimension."""
        return range(self.slices[0].start, self.slices[0].stop)

    @property
    def cost(self) -> int:
        """What an eigendecomposition of every factor takes, up to a constant."""
        return sum(side**3 for side in self.shape)


def merge(shape: Sequence[int], largest: int) -> tuple[int, ...]:
    """The shape without dimensions of 1, each joined to the one before while their product is at most `largest`."""
    merged: list[int] = []
    for side in shape:
        if side == 1:
            continue
        if merged and merged[-1] * side <= largest:
            merged[-1] *= side
        else:
            merged.append(side)
    return tuple(merged) or (1,)


def cut(parameter: int, merged: Sequence[int], largest: int) -> list[Block]:
    """The blocks of a merged parameter, row by row: every dimension split into parts of at most `largest`."""
    cuts = [[slice(i, min(i + largest, side)) for i in range(0, side, largest)] for side in merged]
    places = itertools.product(*(range(len(parts)) for parts in cuts))
    return [
        Block(parameter, "_".join(map(str, place)), tuple(parts[i] for parts, i in zip(cuts, place, strict=True)))
        for place in places
    ]


def deal(costs: Sequence[int], world: int) -> list[int]:
    """The owner of each block: the dearest first, each to the rank with the least so far."""
    owners = [0] * len(costs)
    loads = [(0, rank) for rank in range(world)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, owners[i] = heapq.heappop(loads)
        heapq.heappush(loads, (load + costs[i], owners[i]))
    return owners


def row_range(shape: Sequence[int], merged: Sequence[int], part: int, parts: int) -> range:
    """The merged rows of part `part` of `parts` of a tensor that is sharded over dimension 0 as torch.chunk does it."""
    side = shape[0] if shape else 1
    scale = merged[0] // side if side else 0  # merged rows of a row; a leading dimension of 1 goes whole to part 0
    chunk = math.ceil(side / parts)
    return range(min(part * chunk, side) * scale, min((part + 1) * chunk, side) * scale)
