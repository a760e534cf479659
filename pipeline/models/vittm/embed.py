"""Images to tokens, and the position table for any resolution.

Shapes: B batch, C channels, N tokens, D width; a grid is (rows, columns) of patches.
"""

import torch
from timm.layers import resample_abs_pos_embed
from torch import nn


class PatchEmbedder(nn.Module):
    """Cut an image into square patches and project each to a token, without its position."""

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The grid of an image of (height, width) pixels."""
        return image_size[0] // self.patch_size, image_size[1] // self.patch_size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, height, width) -> (B, N, D), row by row."""
        return self.proj(images).flatten(2).transpose(1, 2)


def positions_for(table: torch.Tensor, built_grid: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """The position table (1, N, D) of `built_grid`, resized (bicubic, antialiased) where `grid` is another."""
    if grid == built_grid:
        return table
    return resample_abs_pos_embed(table, list(grid), list(built_grid), num_prefix_tokens=0)
