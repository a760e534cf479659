"""The Tokens-to-Token module: overlapping patches become tokens, and twice tokens that lie together become one.

Shapes: B batch, N tokens, C width of a token, c token_dim. Names of weights are those of the original's authors.
"""

import math

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.precision import no_autocast
from shards.errors import UserError

Grid = tuple[int, int]
SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # kernel, stride and padding, in pixels and then in tokens
REDUCTION = math.prod(stride for _, stride, _ in SPLITS)
LAYER_NORM_EPS = 1e-5


class TokenAttention(nn.Module):
    """Softmax attention of one head, from tokens of width `in_dim` to width `dim`, whose residual is the value."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.scale = in_dim**-0.5  # not dim: as the authors trained
        self.qkv = nn.Linear(in_dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, in_dim) -> (B, N, dim)."""
        query, key, value = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)  # a dimension of heads: fused kernels need it
        read = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        return (value + self.proj(read)).squeeze(1)


class TransformerLayer(nn.Module):
    """A transformer layer that changes the width of its tokens."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(in_dim, eps=LAYER_NORM_EPS)
        self.attn = TokenAttention(in_dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, in_dim) -> (B, N, dim)."""
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PerformerLayer(nn.Module):
    """The same with attention that is linear in N, by the positive random features of arXiv 2009.14794.

    The features `w` are drawn once and belong to the weights: whoever loads those takes them too.
    """

    w: Tensor  # (m, dim)

    def __init__(self, in_dim: int, dim: int, dropout: float = 0.1, epsilon: float = 1e-8) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.norm1 = nn.LayerNorm(in_dim, eps=LAYER_NORM_EPS)
        self.kqv = nn.Linear(in_dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.Dropout(dropout))
        num_features = dim // 2
        self.register_buffer("w", nn.init.orthogonal_(torch.empty(num_features, dim)) * math.sqrt(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, in_dim) -> (B, N, dim)."""
        key, query, value = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        x = value + self.drop(self.proj(self.attend(query, key, value)))
        return x + self.mlp(self.norm2(x))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Each (B, N, dim). In single precision at least: exponentials and their sums over N outgrow 16 bits."""
        kind = value.dtype
        with no_autocast(value.device):
            query, key, value = (part.to(torch.promote_types(kind, torch.float32)) for part in (query, key, value))
            query, key = self.features(query), self.features(key)
            total = (query * key.sum(dim=1, keepdim=True)).sum(dim=-1, keepdim=True)
            return (query @ (key.transpose(1, 2) @ value) / (total + self.epsilon)).to(kind)

    def features(self, x: Tensor) -> Tensor:
        """(B, N, dim) -> (B, N, m): exp(x w^T - |x|^2 / 2) / sqrt(m)."""
        projected = x @ self.w.to(x.dtype).T
        return torch.exp(projected - x.square().sum(dim=-1, keepdim=True) / 2) / math.sqrt(len(self.w))


LAYERS: dict[str, type[TransformerLayer] | type[PerformerLayer]] = {
    "transformer": TransformerLayer,
    "performer": PerformerLayer,
}


class TokensToToken(nn.Module):
    """Images to tokens, one for 16 x 16 pixels: split, attend, split, attend, split, project.

    Raises UserError for an unknown `tokens_type`.
    """

    def __init__(self, img_size: Grid, tokens_type: str, in_chans: int, token_dim: int, embed_dim: int) -> None:
        super().__init__()
        if tokens_type not in LAYERS:
            raise UserError(f"tokens_type={tokens_type!r} is not available in T2T-ViT; it has {', '.join(LAYERS)}.")
        if token_dim < 2:
            raise UserError(f"token_dim={token_dim}, but a token of the T2T module is at least 2 wide: enlarge it.")
        layer = LAYERS[tokens_type]
        first, second, third = (kernel**2 for kernel, _, _ in SPLITS)
        self.grid_size = grid_of(img_size)
        self.attention1 = layer(in_chans * first, token_dim)
        self.attention2 = layer(token_dim * second, token_dim)
        self.project = nn.Linear(token_dim * third, embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_chans, height, width) -> (B, N, embed_dim), row by row. Raises UserError for an empty image."""
        grid = grid_of((images.shape[-2], images.shape[-1]), SPLITS[:1])
        tokens = self.attention1(split(images, SPLITS[0]))
        tokens = self.attention2(split(as_map(tokens, grid), SPLITS[1]))
        return self.project(split(as_map(tokens, grid_of(grid, SPLITS[1:2])), SPLITS[2]))


def split(maps: Tensor, how: tuple[int, int, int]) -> Tensor:
    """The soft split: maps (B, C, height, width) -> tokens (B, N, C * kernel^2), channel by channel."""
    kernel, stride, padding = how
    return F.unfold(maps, kernel, stride=stride, padding=padding).transpose(1, 2)


def as_map(tokens: Tensor, grid: Grid) -> Tensor:
    """(B, rows * columns, C) -> (B, C, rows, columns)."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def grid_of(size: Grid, splits: tuple[tuple[int, int, int], ...] = SPLITS) -> Grid:
    """Rows and columns of tokens after the splits of a map of that size. Raises UserError where none are left."""
    sides = list(size)
    for kernel, stride, padding in splits:
        sides = [(side + 2 * padding - kernel) // stride + 1 for side in sides]
    if min(sides) < 1:
        raise UserError(
            f"image size {size[0]}x{size[1]} is too small for T2T-ViT, whose first patches overlap by 3 pixels: "
            "give at least 3 pixels a side, of which a token takes 16."
        )
    return sides[0], sides[1]
