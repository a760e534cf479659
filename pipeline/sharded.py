"""Tensors of which every rank holds a flat piece, by name and offset, and their files.

What one strategy on one number of ranks wrote, any other reads: the pieces need not be equal, nor cut alike.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Size, Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list


@dataclass(frozen=True)
class Shard:
    """Elements offset .. offset + len(tensor) - 1 of the `numel` of a tensor, in row-major order.

    tensor: 1-D, this rank's piece; empty where it has none. Ranks may hold the same piece (replicas).
    """

    name: str
    tensor: Tensor
    offset: int
    numel: int

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(Size((self.offset,)), Size((len(self.tensor),)))


def save(shards: Sequence[Shard], directory: Path, group: ProcessGroup | None = None) -> None:
    """Writes the pieces below `directory`, one of equal ones only; every rank of the group calls it."""
    dcp.save(tensors_of(shards), checkpoint_id=directory, planner=SavePlanner(shards), process_group=group)


def load(shards: Sequence[Shard], directory: Path) -> None:
    """Reads into the pieces, in place, whatever pieces were saved; every rank calls it."""
    dcp.load(tensors_of(shards), checkpoint_id=directory, planner=LoadPlanner(shards))


def in_memory(shards: Iterable[Shard]) -> list[Shard]:
    """Copies of the pieces on the CPU."""
    return [dataclasses.replace(shard, tensor=shard.tensor.detach().to("cpu", copy=True)) for shard in shards]


def tensors_of(shards: Iterable[Shard]) -> dict[str, Tensor]:
    """What torch.distributed.checkpoint is given, beside a planner that knows where the pieces belong."""
    return {shard.name: shard.tensor for shard in shards}


class SavePlanner(DefaultSavePlanner):
    """For the tensors of shards, or copies of them."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        super().__init__(flatten_state_dict=False)
        self.shards = shards

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(shard) for shard in self.shards if len(shard.tensor)])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn]


class LoadPlanner(DefaultLoadPlanner):
    """For the tensors of shards."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        super().__init__(flatten_state_dict=False)
        self.shards = shards

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([item for shard in self.shards if len(shard.tensor) for item in self._read_items(shard)])

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn]

    def _read_items(self, shard: Shard) -> list[ReadItem]:
        assert self.metadata is not None
        saved = self.metadata.state_dict_metadata.get(shard.name)
        if not isinstance(saved, TensorStorageMetadata) or saved.size != Size((shard.numel,)):
            raise ValueError(f"{shard.name} has {shard.numel} elements, but what is saved of that name is {saved}")
        return create_read_items_for_chunk_list(shard.name, saved, [shard.chunk])


def _write_item(shard: Shard) -> WriteItem:
    properties = TensorProperties.create_from_tensor(shard.tensor)
    data = TensorWriteData(shard.chunk, properties, Size((shard.numel,)))
    return WriteItem(MetadataIndex(shard.name, shard.chunk.offsets), WriteItemType.SHARD, tensor_data=data)
