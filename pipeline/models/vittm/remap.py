"""Checkpoints of the authors' program (arXiv 2409.07613), under our names."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from pipeline.models.vittm.heads import LinearHead

if TYPE_CHECKING:
    from pipeline.models.vittm.model import ViTTM

_WRAPPERS = {"_orig_mod", "module"}  # of torch.compile, of DDP and AveragedModel
_NEVER_USED = {"n_averaged", "cls_token", "pos_embed"}
_LAYER_PARTS = {
    "blocks": "block",
    "read_norm": "read_norm",
    "read_head": "read_head",
    "write_norm": "write_norm",
    "write_head": "write_head",
    "mem_blocks": "memory_block",
    "mem_encoder": "memory_block.encoder",
    "mem_decoder": "memory_block.decoder",
}


def remap_upstream_state_dict(state_dict: Mapping[str, torch.Tensor], model: "ViTTM") -> dict[str, torch.Tensor]:
    """Rename the authors' keys to ours, so that the result loads strictly into a model of the same options.

    Wrapper prefixes go, and so do the weights which their program creates and never uses: the class token and its
    position table, the 16x16 `patch_embed` beside a `memory_embedder`, and the output projections of lin heads.
    Tensors are passed on as they are; a key that means nothing here keeps its name, for the strict load to name it.
    """
    bare = {_strip_wrappers(key): value for key, value in state_dict.items()}
    has_memory_embedder = any(key.startswith("memory_embedder.") for key in bare)
    renamed = {}
    for key, value in bare.items():
        if not _is_unused(key, model, has_memory_embedder):
            renamed[_our_name(key)] = value
    return renamed


def _strip_wrappers(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _is_unused(key: str, model: "ViTTM", has_memory_embedder: bool) -> bool:
    root, *rest = key.split(".")
    if root == "patch_embed":
        return has_memory_embedder
    if root in {"read_head", "write_head"}:
        return "proj" in rest and isinstance(model.layers[0].read_head, LinearHead)
    return key in _NEVER_USED


def _our_name(key: str) -> str:
    root, *rest = key.split(".")
    if root == "patch_embed":
        return ".".join(["memory_embedder", *rest])
    if root in _LAYER_PARTS:
        return ".".join(["layers", rest[0], _LAYER_PARTS[root], *rest[1:]])
    return key
