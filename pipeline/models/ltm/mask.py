"""The mask module of LTM: which tokens merge, and by what weights.

Shapes: B batch (or windows of it), N tokens, P merged tokens, D width.
"""

from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from pipeline.models.precision import no_autocast

TAU = 0.1  # the temperature that training begins with: cosines become logits from -10 to 10
_LEAST = 1e-6  # of a column's sum, so that a division by it is finite, and its gradient too


class Merges(NamedTuple):
    """A mask G (B, N, P) whose rows have one entry each: `groups`, its column, and `weights`, itself, both (B, N)."""

    groups: Tensor
    weights: Tensor

    def dense(self, num_merged: int) -> Tensor:
        """G (B, N, P)."""
        empty = self.weights.new_zeros(*self.weights.shape, num_merged)
        return empty.scatter(2, self.groups.unsqueeze(2), self.weights.unsqueeze(2))


class Mask:
    """`hard` H and `merging` G, both (B, N, P), have an entry a row, in column `groups` (B, N)."""

    def __init__(self, groups: Tensor, hard: Tensor, merging: Tensor) -> None:
        self.groups, self.hard, self.merging = groups, hard, merging

    def merge(self, tokens: Tensor) -> Tensor:
        """G^T tokens: (B, N, D) -> (B, P, D)."""
        return _Merge.apply(self.merging, tokens, self.groups)

    def unmerge(self, tokens: Tensor) -> Tensor:
        """H tokens: every token takes its group's value; (B, P, D) -> (B, N, D)."""
        return _Unmerge.apply(self.hard, tokens, self.groups)

    def merges(self) -> Merges:
        """G for the next block, which takes it as given: no gradient comes back."""
        return Merges(self.groups, self.merging.detach().gather(2, self.groups.unsqueeze(2)).squeeze(2))


class MaskModule(nn.Module):
    """Tokens (B, N, D) -> the mask that merges them into P = ceil(ratio * N).

    Logits are the cosines of the tokens with P of them, the anchors, over a learned temperature; `takes_previous`: and
    a learned number times the mask of the block before, averaged to (N, P) where that has another size. M is their
    softmax over the P groups, H the one-hot of the largest, straight-through; G = H * M, with columns that sum to 1.

    An anchor stays in its own group, which it is the most like: so no group is ever empty, also where equal tokens or
    the block before would have it choose another. The mask is computed in single precision at least.

    One that does not learn, as no gradient would come to it, has no weights: it goes by the cosines alone.
    """

    def __init__(self, ratio: Fraction, takes_previous: bool, learns: bool = True) -> None:
        super().__init__()
        self.numerator, self.denominator = ratio.numerator, ratio.denominator
        # Of one dimension: FSDP2 shards no scalars.
        self.log_tau = nn.Parameter(torch.full((1,), TAU).log()) if learns else None
        self.scalar = nn.Parameter(torch.zeros(1)) if learns and takes_previous else None

    def num_merged(self, num_tokens: int) -> int:
        """P, exactly: in floats, 0.8 * 245 tokens would be 197."""
        return -(-num_tokens * self.numerator // self.denominator)

    def forward(self, tokens: Tensor, previous: Merges | None = None) -> Mask:
        num_tokens, num_merged = tokens.shape[1], self.num_merged(tokens.shape[1])
        with no_autocast(tokens.device):
            unit = F.normalize(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), dim=-1)
            anchors = middles(num_tokens, num_merged, tokens.device)
            logits = unit @ unit.index_select(1, anchors).mT / self._tau(unit.dtype)
            if self.scalar is not None:
                assert previous is not None, "this block is not the first of its stage: it takes the mask before it"
                logits = logits + self.scalar.to(unit.dtype) * self._pooled(previous, num_tokens).to(unit.dtype)
            return _mask(logits, anchors)

    def _tau(self, dtype: torch.dtype) -> Tensor | float:
        return TAU if self.log_tau is None else self.log_tau.to(dtype).exp()

    @torch.no_grad()
    def _pooled(self, previous: Merges, num_tokens: int) -> Tensor:
        """The mask of the block before, averaged to (B, N, P).

        By products, as adaptive pooling cannot be compiled for a changing number of tokens.
        """
        before = previous.groups.shape[1]
        if before == num_tokens:
            return previous.dense(self.num_merged(before))
        rows = _averages(before, num_tokens, previous.weights)
        columns = _averages(self.num_merged(before), self.num_merged(num_tokens), previous.weights)
        return rows @ (previous.weights.unsqueeze(2) * F.embedding(previous.groups, columns.T))


def middles(num_tokens: int, num_parts: int, device: torch.device) -> Tensor:
    """The tokens in the middles of so many equal parts: int64 (num_parts,)."""
    return (2 * torch.arange(num_parts, device=device) + 1) * num_tokens // (2 * num_parts)


def _averages(before: int, after: int, like: Tensor) -> Tensor:
    """What averages `before` numbers to `after`, each over what falls on its part, as a matrix (after, before); of the
    device and type of `like`."""
    parts, places = torch.arange(after, device=like.device).unsqueeze(1), torch.arange(before, device=like.device)
    starts, ends = parts * before // after, ((parts + 1) * before + after - 1) // after
    inside = ((starts <= places) & (places < ends)).to(like.dtype)
    return inside / inside.sum(dim=1, keepdim=True)


def _mask(logits: Tensor, anchors: Tensor) -> Mask:
    soft = logits.softmax(dim=-1)
    own = torch.arange(len(anchors), device=anchors.device)
    groups = logits.argmax(dim=-1).index_copy(1, anchors, own.expand(logits.shape[0], -1))
    hard = torch.zeros_like(soft).scatter(2, groups.unsqueeze(2), 1.0)
    hard = (hard - soft.detach()) + soft  # exactly 0 and 1, in this order
    chosen = hard * soft
    return Mask(groups, hard, chosen / chosen.sum(dim=1, keepdim=True).clamp_min(_LEAST))


class _Merge(Function):
    """mask^T tokens. Forward sums by index, as a row of the mask has but one entry: the product would cost N P D.
    Backward is that of the product, also for entries that are zero, which straight-through learns by.

    On CUDA the order in which three tokens or more are summed is open, but in torch's deterministic mode.
    """

    @staticmethod
    def forward(mask: Tensor, tokens: Tensor, groups: Tensor) -> Tensor:
        weighted = mask.gather(2, groups.unsqueeze(2)) * tokens
        return _sum_of(weighted, groups, mask.shape[2]).to(tokens.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        mask, tokens, groups = ctx.saved_tensors
        for_mask = tokens.to(mask.dtype) @ grad.to(mask.dtype).mT
        for_tokens = mask.gather(2, groups.unsqueeze(2)) * _value_of(grad, groups)
        return for_mask, for_tokens.to(tokens.dtype), None


class _Unmerge(Function):
    """hard @ tokens, likewise."""

    @staticmethod
    def forward(hard: Tensor, tokens: Tensor, groups: Tensor) -> Tensor:
        return _value_of(tokens, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hard, tokens, groups = ctx.saved_tensors
        for_hard = grad.to(hard.dtype) @ tokens.to(hard.dtype).mT
        return for_hard, _sum_of(grad.to(hard.dtype), groups, hard.shape[2]).to(tokens.dtype), None


def _sum_of(tokens: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """The sum of every group's tokens: (B, N, D) -> (B, num_groups, D)."""
    batch, _, width = tokens.shape
    sums = tokens.new_zeros(batch * num_groups, width)
    return sums.index_add_(0, _rows(groups, num_groups), tokens.flatten(0, 1)).view(batch, num_groups, width)


def _value_of(merged: Tensor, groups: Tensor) -> Tensor:
    """Of every token its group's row: (B, P, D) -> (B, N, D)."""
    rows = _rows(groups, merged.shape[1])
    return merged.flatten(0, 1).index_select(0, rows).view(*groups.shape, -1)


def _rows(groups: Tensor, num_groups: int) -> Tensor:
    """The groups of all samples, numbered through: (B N,)."""
    firsts = num_groups * torch.arange(groups.shape[0], device=groups.device)
    return (groups + firsts.unsqueeze(1)).flatten()
