"""A stage of blocks that merge tokens: it hands the mask of each to the next."""

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.models.ltm.blocks import Merging
from pipeline.models.ltm.mask import MaskModule, Merges


class Chain(nn.Sequential):
    """A stage of timm's, made one of these by `chain`; blocks in it that do not merge are left as they are."""

    grad_checkpointing: bool = False
    kept: Sequence[Merges] = ()
    """The masks of the last forward pass in eval mode; none in training, where nobody asks for them."""

    def forward(self, x: Tensor) -> Tensor:
        merges: list[Merges] = []
        for block in self:
            if isinstance(block, Merging):
                x, made = self._run(block, x, merges[-1] if merges else None)
                merges.append(made)
            else:
                x = block(x)
        if not torch.compiler.is_exporting():  # a program has no place to keep them
            self.kept = () if self.training else merges
        return x

    def merging(self) -> list[tuple[Merging, Merges]]:
        """The blocks that merge, and their masks as far as they are kept."""
        blocks = [block for block in self if isinstance(block, Merging)]
        return list(zip(blocks, self.kept, strict=False))

    def _run(self, block: nn.Module, x: Tensor, previous: Merges | None) -> tuple[Tensor, Merges]:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, previous, use_reentrant=False)
        return block(x, previous)


def chain(stage: nn.Sequential, kinds: dict[type[nn.Module], type[Merging]], ratio: Fraction, last: bool) -> None:
    """In place: blocks of `stage` that are of one of the kinds merge their tokens, and names of weights stay. `last`:
    whether the mask of the last of them learns."""
    stage.__class__ = Chain
    assert isinstance(stage, Chain)
    blocks = [block for block in stage if type(block) in kinds]
    for number, block in enumerate(blocks):
        learns = last or number < len(blocks) - 1
        kinds[type(block)].of(block, MaskModule(ratio, takes_previous=number > 0, learns=learns))
