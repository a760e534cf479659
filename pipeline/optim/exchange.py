"""The way of Shampoo's blocks between the ranks that hold parts of a parameter and the rank that owns a block.

A rank holds rows of the merged parameter: all of them in data parallel, a part of them under FSDP2. Ranks that
together hold a parameter once are one replica. Gradients come to a block's owner from the holders of its own replica;
updates go to the holders of all replicas.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from pipeline.optim.blocks import Block, row_range


@dataclass(frozen=True)
class Holding:
    """The rows of one merged parameter that one rank holds, and in which replica."""

    replica: int
    rows: range


@dataclass(frozen=True)
class Piece:
    """Rows of a block, as counted in the merged parameter."""

    block: int
    rows: range


def rank_and_size() -> tuple[int, int]:
    """Of the default process group; of one process where there is none."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def holdings(parameter: Tensor, merged: Sequence[int]) -> list[Holding]:
    """What every rank holds of a parameter: a DTensor, or a plain tensor, of which every rank has a copy.

    Raises ValueError for a DTensor that is not sharded as `fully_shard` does it, over all ranks.
    """
    _, world = rank_and_size()
    if not isinstance(parameter, DTensor):
        return [Holding(rank, range(merged[0])) for rank in range(world)]
    mesh, placements = parameter.device_mesh, parameter.placements
    sharded = [dim for dim, placement in enumerate(placements) if placement == Shard(0)]
    replicated = [dim for dim, placement in enumerate(placements) if placement.is_replicate()]
    if len(sharded) != 1 or len(sharded) + len(replicated) != mesh.ndim or mesh.size() != world:
        raise ValueError(
            f"Shampoo takes DTensors that are sharded over dimension 0 on all {world} ranks, with or without replicas, "
            f"not {placements} on a mesh of {mesh.size()}: shard by fully_shard's defaults"
        )
    parts = mesh.size(sharded[0])
    found = {
        rank: Holding(replica, row_range(parameter.shape, merged, part, parts))
        for part, ranks in enumerate(mesh.mesh.movedim(sharded[0], 0).reshape(parts, -1).tolist())
        for replica, rank in enumerate(ranks)
    }
    return [found[rank] for rank in range(world)]


class Exchange:
    """The routes of all blocks, as this rank sees them; every rank makes the same calls in the same order.

    held: of every parameter, what each rank holds; wire: an empty tensor of the device and type in which pieces travel.
    """

    def __init__(
        self, blocks: Sequence[Block], owners: Sequence[int], held: Sequence[Sequence[Holding]], wire: Tensor
    ) -> None:
        self.blocks = blocks
        self.rows = [parameter[rank_and_size()[0]].rows for parameter in held]
        to_owners, to_holders = Way(wire), Way(wire)
        for i, (block, owner) in enumerate(zip(blocks, owners, strict=True)):
            replica = held[block.parameter][owner].replica
            for rank, holding in enumerate(held[block.parameter]):
                piece = Piece(i, _overlap(block.rows, holding.rows))
                if piece.rows and holding.replica == replica:
                    to_owners.add(rank, owner, piece)
                if piece.rows:
                    to_holders.add(owner, rank, piece)
        self.to_owners, self.to_holders = to_owners, to_holders

    def collect(self, gradients: Sequence[Tensor]) -> dict[int, Tensor]:
        """The whole gradient of each block that this rank owns, from the rows of every parameter that it holds."""

        def cut(piece: Piece) -> Tensor:
            block = self.blocks[piece.block]
            rows = _slice(piece.rows, self.rows[block.parameter])
            return gradients[block.parameter][(rows, *block.slices[1:])]

        found: dict[int, list[tuple[int, Tensor]]] = {}
        for piece, values in self.to_owners.send(cut, self._shape):
            found.setdefault(piece.block, []).append((piece.rows.start, values))
        in_order = {block: [values for _, values in sorted(parts, key=_first)] for block, parts in found.items()}
        return {block: parts[0] if len(parts) == 1 else torch.cat(parts) for block, parts in in_order.items()}

    def deliver(self, updates: dict[int, Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        """The update of the rows that this rank holds, of every parameter, from their owners' updates of blocks.

        gradients: as for `collect`, of which each takes its shape.
        """

        def cut(piece: Piece) -> Tensor:
            return updates[piece.block][_slice(piece.rows, self.blocks[piece.block].rows)]

        found = [self.to_holders.wire.new_empty(rows.shape) for rows in gradients]
        for piece, values in self.to_holders.send(cut, self._shape):
            block = self.blocks[piece.block]
            rows = _slice(piece.rows, self.rows[block.parameter])
            found[block.parameter][(rows, *block.slices[1:])] = values
        return found

    def _shape(self, piece: Piece) -> tuple[int, ...]:
        return (len(piece.rows), *self.blocks[piece.block].shape[1:])


class Way:
    """Pieces in one direction; `add` them on every rank alike."""

    def __init__(self, wire: Tensor) -> None:
        self.wire = wire
        self.rank, world = rank_and_size()
        self.crosses = False
        self.kept: list[Piece] = []
        self.out: list[list[Piece]] = [[] for _ in range(world)]
        self.back: list[list[Piece]] = [[] for _ in range(world)]

    def add(self, source: int, target: int, piece: Piece) -> None:
        if source == target:
            self.kept += [piece] * (source == self.rank)
            return
        self.crosses = True
        if source == self.rank:
            self.out[target].append(piece)
        if target == self.rank:
            self.back[source].append(piece)

    def send(
        self, cut: Callable[[Piece], Tensor], shape: Callable[[Piece], tuple[int, ...]]
    ) -> list[tuple[Piece, Tensor]]:
        """What comes to this rank, with what stays on it. Where nothing crosses on any rank, nothing is sent."""
        kept = [(piece, cut(piece)) for piece in self.kept]
        if not self.crosses:
            return kept
        shapes = [[shape(piece) for piece in pieces] for pieces in self.back]
        sizes = [[torch.Size(each).numel() for each in row] for row in shapes]
        received = self.wire.new_empty(sum(map(sum, sizes)))
        sent = [
            torch.cat([self.wire, *(cut(piece).flatten().to(self.wire) for piece in pieces)]) for pieces in self.out
        ]
        dist.all_to_all_single(received, torch.cat(sent), [sum(row) for row in sizes], [len(values) for values in sent])
        flat = received.split([size for row in sizes for size in row])
        pieces = [piece for row in self.back for piece in row]
        return kept + [
            (piece, values.view(each))
            for piece, values, each in zip(pieces, flat, [each for row in shapes for each in row], strict=True)
        ]


def _overlap(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))


def _slice(rows: range, of: range) -> slice:
    """The rows of the parameter as a slice of a tensor that begins with its row `of.start`."""
    return slice(rows.start - of.start, rows.stop - of.start)


def _first(part: tuple[int, Tensor]) -> int:
    return part[0]
