"""Where on an image tokens merged."""

import torch
from torch import Tensor

from pipeline.models.ltm.models import LTM


def num_maps(model: LTM) -> int:
    """How many blocks merged tokens in the last forward pass in eval mode."""
    return sum(len(stage.kept) for stage in model.chains())


def merged_on(model: LTM, number: int) -> tuple[Tensor, Tensor]:
    """What block `number` of `num_maps` did in the last forward pass, which was of one square image.

    Both [rows, columns], for every place of its map: the number of the merged token that the token there went into,
    and by what weight. Where tokens stay merged, the map is the first block's, and weights are products of all masks
    up to this one.
    """
    up_to = [stage.merging()[: last + 1] for stage in model.chains() for last in range(len(stage.kept))][number]
    block, _ = up_to[-1]
    (targets, weights), *later = [merges for _, merges in (up_to if block.shrinks else up_to[-1:])]
    num_tokens = targets.shape[1]
    for groups, factors in later:
        num_tokens = groups.shape[1]
        weights, targets = weights * factors.gather(1, targets), groups.gather(1, targets)
    firsts = block.mask.num_merged(num_tokens) * torch.arange(len(targets), device=targets.device)
    return block.on_map(targets + firsts.unsqueeze(1)), block.on_map(weights)
