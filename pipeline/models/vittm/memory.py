"""Memory blocks: what memory tokens go through in a layer, around the process tokens' transformer block.

`encode` comes before that block and `decode` after the write; what `encode` keeps aside is handed to `decode`.
Shapes: B batch, N tokens, D width, C = D / 4 channels; convolutions run over the sequence of tokens, row by row.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn

from pipeline.models.vittm.checks import check_choice, check_divides, check_positive, check_stages

_KERNEL = 7
_EXPANSION = 4  # of the channels, in a ConvNeXt block
_GAMMA = 1e-6  # LayerScale of a ConvNeXt block


@dataclass(frozen=True)
class MemoryOptions:
    """Which memory blocks a model has. Raises UserError for a kind that there is not, and for stages that do not
    match."""

    memory_blocks: str | None
    mlp_ratio: float
    encoder_depths: tuple[int, ...]
    encoder_downsamples: tuple[int, ...]
    decoder_depths: tuple[int, ...]

    def __post_init__(self) -> None:
        check_choice("memory_blocks", self.memory_blocks, (None, "", "mlp", "conv"))
        check_stages(self.encoder_depths, self.encoder_downsamples, self.decoder_depths)

    def build(self, dim: int) -> "MemoryBlock":
        """The block of a layer of width `dim`. Raises UserError where the width does not suit it."""
        if self.memory_blocks == "mlp":
            return MlpMemoryBlock(dim, self.mlp_ratio)
        if self.memory_blocks == "conv":
            return ConvMemoryBlock(dim, self)
        return MemoryBlock()

    def num_written(self, num_memory: int) -> int:
        """How many tokens memory has between `encode` and `decode`."""
        if self.memory_blocks != "conv":
            return num_memory
        tokens = torch.empty(1, 1, num_memory, device="meta")
        for stride in self.encoder_downsamples:
            tokens = _downsample(stride)(tokens)
        return tokens.shape[-1]


class MemoryBlock(nn.Module):
    """Leaves memory as it is."""

    def encode(self, memory: Tensor) -> tuple[Tensor, Any]:
        """(B, N, D) -> the memory that is written to, (B, N or fewer, D), and what `decode` needs."""
        return memory, None

    def decode(self, memory: Tensor, kept: Any) -> Tensor:
        """The written memory -> (B, N, D)."""
        return memory


class MlpMemoryBlock(MemoryBlock):
    """A small MLP of every token: m + fc2(GELU(fc1(LN m)))."""

    def __init__(self, dim: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        check_positive("int(embed_dim * memory_mlp_ratio)", hidden)
        self.norm = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden)

    def decode(self, memory: Tensor, kept: Any) -> Tensor:
        return memory + self.mlp(self.norm(memory))


class ConvMemoryBlock(MemoryBlock):
    """Memory is downsampled by convolutions, written to, brought back to its length, and added to what it was."""

    def __init__(self, dim: int, options: MemoryOptions) -> None:
        super().__init__()
        check_divides("4", 4, "embed_dim", dim, "conv memory blocks work on a quarter of the width")
        self.encoder = Encoder(dim, options.encoder_depths, options.encoder_downsamples)
        self.decoder = Decoder(dim, options.decoder_depths)

    def encode(self, memory: Tensor) -> tuple[Tensor, Any]:
        encoded, lengths = self.encoder(memory)
        return encoded, (memory, lengths)

    def decode(self, memory: Tensor, kept: Any) -> Tensor:
        before, lengths = kept
        return before + self.decoder(memory, lengths)


class Encoder(nn.Module):
    """`blocks` alternates: how a stage downsamples, and its ConvNeXt blocks."""

    def __init__(self, dim: int, depths: tuple[int, ...], strides: tuple[int, ...]) -> None:
        super().__init__()
        channels = dim // 4
        self.down_proj = nn.Conv1d(dim, channels, 1)
        stages = [(_downsample(stride), _stage(channels, depth)) for stride, depth in zip(strides, depths, strict=True)]
        self.blocks = nn.ModuleList(module for stage in stages for module in stage)
        self.up_proj = nn.Conv1d(channels, dim, 1)

    def forward(self, memory: Tensor) -> tuple[Tensor, list[int]]:
        """(B, N, D) -> fewer tokens (B, n, D), and the lengths that the stages began with."""
        tokens, lengths = self.down_proj(memory.transpose(1, 2)), []
        for downsample, stage in zip(self.blocks[::2], self.blocks[1::2], strict=True):
            lengths.append(tokens.shape[-1])
            tokens = stage(downsample(tokens))
        return self.up_proj(tokens).transpose(1, 2), lengths


class Decoder(nn.Module):
    """`blocks` alternates: the ConvNeXt blocks of a stage, and how it upsamples; the encoder's last stage is first."""

    def __init__(self, dim: int, depths: tuple[int, ...]) -> None:
        super().__init__()
        channels = dim // 4
        self.down_proj = nn.Conv1d(dim, channels, 1)
        self.blocks = nn.ModuleList(module for depth in depths for module in (_stage(channels, depth), Upsample()))
        self.mix = nn.Conv1d(channels, channels, _KERNEL, padding="same", groups=channels)
        self.up_proj = nn.Conv1d(channels, dim, 1)

    def forward(self, memory: Tensor, lengths: list[int]) -> Tensor:
        """(B, n, D) -> (B, lengths[0], D)."""
        tokens = self.down_proj(memory.transpose(1, 2))
        for stage, upsample, length in zip(self.blocks[::2], self.blocks[1::2], reversed(lengths), strict=True):
            tokens = upsample(stage(tokens), length)
        return self.up_proj(self.mix(tokens)).transpose(1, 2)


class Upsample(nn.Module):
    def forward(self, tokens: Tensor, length: int) -> Tensor:
        """The nearest token each: (B, C, n) -> (B, C, length)."""
        return tokens if tokens.shape[-1] == length else F.interpolate(tokens, size=length, mode="nearest")


class ConvNeXtBlock(nn.Module):
    """ConvNeXt V2 (Woo et al. 2023, arXiv 2301.00808) over a sequence: (B, C, n) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv1d(channels, channels, _KERNEL, padding="same", groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = ConvMlp(channels)
        self.gamma = nn.Parameter(torch.full((channels,), _GAMMA))

    def forward(self, tokens: Tensor) -> Tensor:
        mixed = self.norm(self.conv_dw(tokens).transpose(1, 2)).transpose(1, 2)
        return tokens + self.gamma[:, None] * self.mlp(mixed)


class ConvMlp(nn.Module):
    """1x1 convolutions, with a Global Response Norm between them: x + beta + gamma x n, n over the whole sequence."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = _EXPANSION * channels
        self.fc1 = nn.Conv1d(channels, hidden, 1)
        self.grn = GlobalResponseNorm(hidden, channels_last=False)
        self.fc2 = nn.Conv1d(hidden, channels, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        activated = F.gelu(self.fc1(tokens))
        return self.fc2(self.grn(activated.unsqueeze(2)).squeeze(2))  # timm's norm is over images: a row of one


def _stage(channels: int, depth: int) -> nn.Sequential:
    return nn.Sequential(*(ConvNeXtBlock(channels) for _ in range(depth)))


def _downsample(stride: int) -> nn.Module:
    return nn.AvgPool1d(2, stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
