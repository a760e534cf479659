"""k-means over vectors of which every rank holds some: the same centroids, to the bit, however they are dealt out.

Shapes: n vectors of a rank, R of a chunk, D width, K centroids.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.backend import World

CHUNK = 256
"""Vectors that are looked at together. All products have this height: others might be rounded otherwise."""
_FRACTION = 2.0**32


@dataclass(frozen=True)
class Share:
    """This rank's vectors: `whole` (n, ...), of which `prepare` makes rows (R, D), on the device they are wanted on."""

    world: World
    whole: Tensor
    prepare: Callable[[Tensor], Tensor]

    def chunks(self) -> Iterator[tuple[Tensor, int]]:
        """Rows of length 1, (CHUNK, D), and how many of these there are; the others are zeros."""
        for part in self.whole.split(CHUNK):
            rows = F.normalize(self.prepare(part), dim=1)
            yield F.pad(rows, (0, 0, 0, CHUNK - len(rows))), len(rows)

    def map(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """`function` of rows, (CHUNK, D) -> (CHUNK, ...), of all of them: (n, ...)."""
        return torch.cat([function(rows)[:number] for rows, number in self.chunks()])

    def evenly(self, number: int) -> Tensor:
        """So many of all ranks' vectors, evenly spaced: (number, D)."""
        counts = self.world.gather(len(self.whole))
        before, total = sum(counts[: self.world.rank]), sum(counts)
        places = torch.arange(number) * total // number - before
        mine = (places >= 0) & (places < len(self.whole))
        found = F.normalize(self.prepare(self.whole[places[mine].to(self.whole.device)]), dim=1)
        rows = found.new_zeros(number, found.shape[1])
        rows[mine.to(rows.device)] = found
        return self.world.total(rows)


def kmeans(share: Share, num_centroids: int, iterations: int) -> Tensor:
    """Centroids of length 1, (K, D), by the angle: the nearest one is that with the largest product.

    The first are vectors evenly spaced; one without vectors stays. It ends when nothing moves any more. Raises Stopped,
    on every rank, where one was signalled.
    """
    centroids = share.evenly(num_centroids)
    for iteration in range(iterations):
        share.world.reach(f"bottleneck: clustering, pass {iteration + 1}")
        moved = _move(share, centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


def _move(share: Share, centroids: Tensor) -> Tensor:
    sums = torch.zeros_like(centroids, dtype=torch.float64)
    for rows, number in share.chunks():
        nearest = (rows @ centroids.mT).argmax(dim=1)
        sums.index_add_(0, nearest[:number], summable(rows[:number]))
    filled = share.world.total(sums).any(dim=1, keepdim=True)
    F.normalize(sums, dim=1, out=sums)  # in place: of pixels, another copy would be gigabytes
    return torch.where(filled, sums.float(), centroids)


def summable(values: Tensor) -> Tensor:
    """float64, rounded to multiples of 2^-32: 2^20 of these between -1 and 1 have the same sum in whatever order."""
    return (values.double() * _FRACTION).round_() / _FRACTION
