"""Checkpoints of T2T-ViT's authors, and of MMPretrain, under our names: those of the authors."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from pipeline.models.t2t_vit.model import T2TViT

_WRAPPERS = re.compile(r"(?:^|\.)(?:module|_orig_mod)(?=\.)")  # of DDP, and of torch.compile
_MMPRETRAIN = (
    (r"^backbone\.", ""),
    (r"^encoder\.", "blocks."),
    (r"\bln([12])\.", r"norm\1."),
    (r"\bffn\.layers\.0\.0\.", "mlp.fc1."),
    (r"\bffn\.layers\.1\.", "mlp.fc2."),
    (r"^head\.(?:fc|layers\.head)\.", "head."),
)


def remap_upstream_state_dict(state_dict: Mapping[str, Tensor], model: "T2TViT") -> dict[str, Tensor]:
    """Rename keys to ours, so that the result loads strictly into a model of the same options.

    The authors' names are ours but for wrapper prefixes. Tensors are passed on as they are; a key that means nothing
    here keeps its name, for the strict load to name it. `model` decides nothing yet: every family's takes it.
    """
    return {_our_name(key): value for key, value in state_dict.items()}


def _our_name(key: str) -> str:
    key = _WRAPPERS.sub("", key).lstrip(".")
    for pattern, ours in _MMPRETRAIN:
        key = re.sub(pattern, ours, key)
    return key
