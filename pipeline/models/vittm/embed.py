"""Images to tokens, and the position table for any resolution.

Shapes: B batch, C channels, N tokens, D width; sizes are (height, width) in pixels, grids (rows, columns) of tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.vittm.checks import check_choice, check_image_size, check_pooled_side, check_process_tokens

Grid = tuple[int, int]


@dataclass(frozen=True)
class EmbedOptions:
    """How images become memory and process tokens.

    `process_tokens`: the number of latent tokens, or the side of the grid that memory is pooled to; None stands for as
    many as `process_ps` would cut of an image of `image_size`. Raises UserError for what cannot be made of such images.
    """

    image_size: Grid
    in_chans: int
    memory_ps: int
    process_ps: int
    process_tokens: int | None
    process_embedder_type: str

    def __post_init__(self) -> None:
        check_choice("process_embedder_type", self.process_embedder_type, ("patch", "downsample", "latent"))
        check_process_tokens(self.process_embedder_type, self.process_tokens)
        counted = {"process_ps": self.process_ps} if self.process_tokens is None else {}
        check_image_size(self.image_size, self.patch_sizes | counted)
        if self.process_embedder_type == "downsample":
            check_pooled_side(self._process_grid(), self._cut(self.memory_ps))

    @property
    def patch_sizes(self) -> dict[str, int]:
        """The options by which an image is cut, and their values in pixels."""
        sizes = {"memory_ps": self.memory_ps, "process_ps": self.process_ps}
        return sizes if self.process_embedder_type == "patch" else {"memory_ps": self.memory_ps}

    def build_memory(self, dim: int) -> "PatchEmbedder":
        return PatchEmbedder(self.memory_ps, self.in_chans, dim)

    def build_process(self, dim: int) -> "PatchEmbedder | DownsampleEmbedder | LatentEmbedder":
        """An embedder called as embedder(images, memory (B, Nm, D) without positions, memory's grid) -> (B, Np, D)."""
        if self.process_embedder_type == "patch":
            return PatchEmbedder(self.process_ps, self.in_chans, dim)
        rows, columns = self._process_grid()
        return (
            LatentEmbedder(rows * columns, dim) if self.process_embedder_type == "latent" else DownsampleEmbedder(rows)
        )

    def _process_grid(self) -> Grid:
        if self.process_tokens is None:
            return self._cut(self.process_ps)
        return (1 if self.process_embedder_type == "latent" else self.process_tokens), self.process_tokens

    def _cut(self, patch_size: int) -> Grid:
        return self.image_size[0] // patch_size, self.image_size[1] // patch_size


class PatchEmbedder(nn.Module):
    """Cut an image into square patches and project each to a token, without its position."""

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = PatchConv(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def grid(self, image_size: Grid) -> Grid:
        """The grid of an image of that size."""
        return image_size[0] // self.patch_size, image_size[1] // self.patch_size

    def init_process(self) -> None:
        """The start of a process embedder; memory's is PyTorch's own."""
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type] # it has one

    def forward(self, images: Tensor, *_: object) -> Tensor:
        """(B, C, height, width) -> (B, N, D), row by row."""
        return self.proj(images)


class PatchConv(nn.Conv2d):
    """A convolution whose stride is its kernel, as one product of all patches: quicker than oneDNN's on a CPU."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, height, width) -> (B, N, D), row by row."""
        rows, columns = self.kernel_size
        cut = images.unflatten(2, (-1, rows)).unflatten(4, (-1, columns))  # (B, C, n, rows, m, columns)
        patches = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, n m, C rows columns)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class DownsampleEmbedder(nn.Module):
    """Process tokens are averages of memory tokens, on a grid of `side` x `side` whatever the image."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def grid(self, image_size: Grid) -> Grid:
        return self.side, self.side

    def init_process(self) -> None:
        """There are no weights."""

    def forward(self, images: Tensor, memory: Tensor, memory_grid: Grid) -> Tensor:
        """memory (B, rows x columns, D) -> (B, side^2, D). Raises UserError where memory has a smaller grid."""
        check_pooled_side((self.side, self.side), memory_grid)
        return F.adaptive_avg_pool2d(memory.mT.unflatten(2, memory_grid), self.side).flatten(2).mT


class LatentEmbedder(nn.Module):
    """Process tokens are learned, and the same for every image."""

    def __init__(self, num_tokens: int, dim: int) -> None:
        super().__init__()
        self.process_token = nn.Parameter(torch.empty(1, num_tokens, dim))

    def grid(self, image_size: Grid) -> Grid:
        """They have no place in the image: one row."""
        return 1, self.process_token.shape[1]

    def init_process(self) -> None:
        nn.init.normal_(self.process_token)

    def forward(self, images: Tensor, *_: object) -> Tensor:
        return self.process_token.expand(images.shape[0], -1, -1)


def positions_for(table: Tensor, built_grid: Grid, grid: Grid) -> Tensor:
    """The position table (1, N, D) of `built_grid`, resized (bicubic, antialiased) where `grid` is another."""
    if grid == built_grid:
        return table
    dtype = torch.promote_types(table.dtype, torch.float32)  # the filter is not made for narrower ones
    image = table.mT.unflatten(2, built_grid).to(dtype)
    resized = F.interpolate(image, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return resized.flatten(2).mT.to(table.dtype)
