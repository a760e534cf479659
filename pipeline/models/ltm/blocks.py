"""Blocks of timm whose tokens merge after the attention: each keeps its weights, and gets a mask module.

A block takes its tokens and the mask of the block before it in its stage, and gives both. Those of dense maps un-merge
at their end, so that every position of the map is left.

Shapes: B batch, N tokens, P merged tokens, D width; S sets of tokens an image that merge apart.
"""

import math
from typing import Any, ClassVar, Self

import torch
from timm.models.efficientvit_mit import EfficientVitBlock, MBConv
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.autograd import Function

from pipeline.models.ltm.mask import MaskModule, Merges

Merged = tuple[Tensor, Merges]


class Merging(nn.Module):
    """What the blocks share."""

    shrinks: ClassVar[bool] = False
    """Whether the next block gets the merged tokens."""
    mask: MaskModule

    @classmethod
    def of(cls, block: nn.Module, mask: MaskModule) -> Self:
        """The block itself, which is one of these from now on."""
        block.__class__ = cls
        assert isinstance(block, cls)
        block.mask = mask
        return block

    @staticmethod
    def on_map(values: Tensor) -> Tensor:
        """Of a square image: what belongs to its tokens, (S, N), at their places on the map, (side, side)."""
        side = math.isqrt(values.numel())
        return values.reshape(side, side)


class ViTBlock(Merging, Block):
    """Of ViT: the tokens stay merged. `num_prefix_tokens` are left alone."""

    shrinks = True
    num_prefix_tokens: int

    def forward(self, x: Tensor, previous: Merges | None = None) -> Merged:  # type: ignore[override] # the mask, too
        """(B, prefix + N, D) -> (B, prefix + P, D)."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        mask = self.mask(patches, previous)
        x = torch.cat((prefix, mask.merge(patches)), dim=1)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), mask.merges()


class MobileViTBlock(Merging, Block):
    """Of MobileViT, whose attention is among the pixels that have the same place in their patches of 2 x 2."""

    def forward(self, x: Tensor, previous: Merges | None = None) -> Merged:  # type: ignore[override] # the mask, too
        """(B S, N, D) -> the same."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        mask = self.mask(x, previous)
        x = mask.merge(x)
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return mask.unmerge(x), mask.merges()

    @staticmethod
    def on_map(values: Tensor) -> Tensor:
        patch, grid = (math.isqrt(number) for number in values.shape)
        return values.reshape(patch, patch, grid, grid).permute(2, 0, 3, 1).reshape(grid * patch, grid * patch)


class SwinBlock(Merging, SwinTransformerBlock):
    """Of Swin: tokens merge within windows, which stay where they are also in blocks whose attention shifts them, so
    that a mask is about the same tokens as the one before it. A window is the largest that divides the map and is not
    larger than that of attention: 4 of 8 places a side where attention has 7, and of 11 places 1, which merges none."""

    def forward(self, x: Tensor, previous: Merges | None = None) -> Merged:  # type: ignore[override] # the mask, too
        """(B, rows, columns, D) -> the same."""
        x = x + self.drop_path1(self._attn(self.norm1(x)))
        batch, rows, columns, width = x.shape
        window = _divisor(rows, self.window_size[0]), _divisor(columns, self.window_size[1])
        tokens = window_partition(x, window).flatten(1, 2)
        mask = self.mask(tokens, previous)
        merged = mask.merge(tokens).reshape(batch, -1, width)  # as one sequence: DropPath drops whole samples
        merged = merged + self.drop_path2(self.mlp(self.norm2(merged)))
        tokens = mask.unmerge(merged.reshape(tokens.shape[0], -1, width))
        return window_reverse(tokens, window, rows, columns), mask.merges()

    @staticmethod
    def on_map(values: Tensor) -> Tensor:
        grid, window = (math.isqrt(number) for number in values.shape)
        return values.reshape(grid, grid, window, window).permute(0, 2, 1, 3).reshape(grid * window, grid * window)


class EfficientViTBlock(Merging, EfficientVitBlock):
    """Of EfficientViT: the 1x1 convolutions see the merged tokens, the 3x3 convolution between them the whole map."""

    def forward(self, x: Tensor, previous: Merges | None = None) -> Merged:
        """(B, D, rows, columns) -> the same."""
        x = _Aligned.apply(self.context_module(x))
        grid = x.shape[-2:]
        tokens = x.flatten(2).mT
        mask = self.mask(tokens, previous)
        merged, convolutions = mask.merge(tokens), self.local_module.main
        assert isinstance(convolutions, MBConv)
        inner = _as_tokens(convolutions.inverted_conv(_as_row(merged)))
        inner = convolutions.depth_conv(mask.unmerge(inner).mT.unflatten(2, grid))
        inner = mask.merge(inner.flatten(2).mT)
        merged = merged + _as_tokens(_Aligned.apply(convolutions.point_conv(_as_row(inner))))
        return mask.unmerge(merged).mT.unflatten(2, grid), mask.merges()


class _Aligned(Function):
    """What comes out of a batch norm, whose gradient comes back in the layout that its shape says. Torch's batch norms
    on CPU (2.12) take gradients for others, without a word, where a dimension of size 1 has a stride of its own."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Nothing is needed."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def _as_row(tokens: Tensor) -> Tensor:
    """(B, P, D) -> (B, D, 1, P)."""
    return tokens.mT.unsqueeze(2)


def _as_tokens(row: Tensor) -> Tensor:
    """(B, D, 1, P) -> (B, P, D)."""
    return row.squeeze(2).mT


def _divisor(side: int, largest: int) -> int:
    return next(number for number in range(min(side, largest), 0, -1) if side % number == 0)
