"""The start that the authors' program takes in silence: the transformer blocks of a ViT that is trained already."""

import re
from collections.abc import Mapping

import torch
from timm.layers.patch_embed import resample_patch_embed
from torch import Tensor

from pipeline.models.vittm.embed import PatchEmbedder
from pipeline.models.vittm.model import ViTTM

TRUNKS = {
    "vittm_tiny": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "vittm_small": "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "vittm_base": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "vittm_large": "vit_large_patch16_224.augreg_in21k_ft_in1k",
    "deittm_tiny": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    # Blocks with LayerScale: those of the ViTs above have none, and would begin as good as switched off.
    "deittm_small": "deit3_small_patch16_224.fb_in22k_ft_in1k",
    "deittm_base": "deit3_base_patch16_224.fb_in22k_ft_in1k",
    "deittm_large": "deit3_large_patch16_224.fb_in22k_ft_in1k",
}
"""The model of timm, fine-tuned on ImageNet-1k, that each size can start from."""
_BLOCK = re.compile(r"^blocks\.(\d+)\.")
_PATCHES = "patch_embed.proj"


def from_trunk(model: ViTTM, trunk: Mapping[str, Tensor], flexi: bool) -> tuple[list[str], dict[str, Tensor]]:
    """The names of the weights of `model` that should come from a ViT, and those that do, as `model` names them.

    Both are the blocks', and with `flexi` those of the convolutions that cut patches: the ViT's own, of 16 pixels,
    at another size by the pseudo-inverse of the resize of patches (FlexiViT, Beyer et al. 2023, arXiv 2212.08013,
    eq. 4; bicubic and antialiased). `trunk` is under timm's names; nothing else of it is used.
    """
    given = {_BLOCK.sub(r"layers.\1.block.", name): tensor for name, tensor in trunk.items() if _BLOCK.match(name)}
    wanted = [name for name in model.state_dict() if ".block." in name]
    for name in ("memory_embedder", "process_embedder") if flexi else ():
        embedder = getattr(model, name)
        if isinstance(embedder, PatchEmbedder):
            wanted += [f"{name}.proj.weight", f"{name}.proj.bias"]
            given |= _convolution(f"{name}.proj", embedder.patch_size, trunk)
    return wanted, given


def _convolution(name: str, patch_size: int, trunk: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if f"{_PATCHES}.weight" not in trunk:
        return {}
    with torch.no_grad():
        kernel = resample_patch_embed(trunk[f"{_PATCHES}.weight"], [patch_size, patch_size])
    return {f"{name}.weight": kernel, f"{name}.bias": trunk[f"{_PATCHES}.bias"]}
