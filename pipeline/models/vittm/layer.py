"""One layer of ViTTM. Shapes: B batch, Nm/Np memory/process tokens, D width."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from pipeline.models.vittm.checks import check_positive, check_rate
from pipeline.models.vittm.memory import MemoryBlock

Fusion = Callable[[Tensor, Tensor], Tensor]
LayerNorm = partial(nn.LayerNorm, eps=1e-6)


@dataclass(frozen=True)
class DropRates:
    """What is dropped in training, by ViTTM's options. Raises UserError unless each is from 0 to below 1."""

    drop_rate: float
    pos_drop_rate: float
    patch_drop_rate: float
    proj_drop_rate: float
    attn_drop_rate: float
    drop_path_rate: float

    def __post_init__(self) -> None:
        for option, rate in vars(self).items():
            check_rate(option, rate)

    def paths(self, depth: int) -> list[float]:
        """Of each layer: from 0 in the first to `drop_path_rate` in the last. Raises UserError without a layer."""
        check_positive("depth", depth)
        return [self.drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]


class Layer(nn.Module):
    """Read from memory, think, write to memory: the unit of sharding, compilation and activation checkpointing."""

    def __init__(
        self, dim: int, read_head: nn.Module, block: nn.Module, write_head: nn.Module, memory_block: MemoryBlock
    ) -> None:
        super().__init__()
        self.read_norm = LayerNorm(dim)
        self.read_head = read_head
        self.block = block
        self.write_norm = LayerNorm(dim)
        self.write_head = write_head
        self.memory_block = memory_block

    def forward(self, memory: Tensor, process: Tensor, fuse_read: Fusion, fuse_write: Fusion) -> tuple[Tensor, Tensor]:
        """memory (B, Nm, D), process (B, Np, D) -> the same. The norms replace the streams: no skip goes round them.

        The fusions are given because their weights are shared by all layers.
        """
        memory, process = self.read_norm(memory), self.read_norm(process)
        process = fuse_read(self.read_head(source=memory, query=process), process)
        memory, kept = self.memory_block.encode(memory)
        process = self.block(process)
        memory, process = self.write_norm(memory), self.write_norm(process)
        memory = fuse_write(self.write_head(source=process, query=memory), memory)
        return self.memory_block.decode(memory, kept), process
