"""LTM as the specification words it: one sample and one token after the other, with products of whole matrices.

Also small models of each family, of which every mask has something to decide.
"""

from collections.abc import Callable
from fractions import Fraction
from math import ceil

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipeline.models  # noqa: F401 - fills the registry

SIDES = {"ltm_vit_small": 32, "ltm_swin_tiny": 48, "ltm_mobilevit_xs": 96, "ltm_efficientvit_b1": 64}
SMALL = {
    "ltm_vit_small": {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3},
    "ltm_swin_tiny": {
        "img_size": 48, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (1, 2), "drop_path_rate": 0.0
    },
    "ltm_mobilevit_xs": {"width_factor": 0.5},
    "ltm_efficientvit_b1": {"width_factor": 0.25},
}  # fmt: skip
FAMILIES = tuple(SMALL)
Masks = list[Tensor]


def build(name: str, **more: object) -> nn.Module:
    """In training, but that norms of batches are those of evaluation; what timm starts at zero is not."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **SMALL[name] | more).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.eval()
    return model


def unlike(model: nn.Module) -> nn.Module:
    """Its masks go by what they learned."""
    with torch.no_grad():
        for number, name in enumerate(model.mask_names()):
            model.get_parameter(name).fill_(3.0 + number if name.endswith("scalar") else -1.5 - 0.1 * number)
    return model


def images(name: str, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, SIDES[name], SIDES[name], generator=torch.Generator().manual_seed(1))


def pooled(mask: Tensor, rows: int, columns: int) -> Tensor:
    """Means over what falls on each of the new places, the ends included."""
    found = torch.zeros(rows, columns, dtype=mask.dtype)
    for row in range(rows):
        for column in range(columns):
            top, left = row * mask.shape[0] // rows, column * mask.shape[1] // columns
            bottom, right = ceil((row + 1) * mask.shape[0] / rows), ceil((column + 1) * mask.shape[1] / columns)
            found[row, column] = mask[top:bottom, left:right].mean()
    return found


def mask_of(module: nn.Module, tokens: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor]:
    """H and G (N, P) of tokens (N, D)."""
    num_tokens = len(tokens)
    num_merged = ceil(Fraction(4, 5) * num_tokens)
    anchors = [int((part + 0.5) * num_tokens / num_merged) for part in range(num_merged)]
    unit = [token / token.norm() for token in tokens]
    logits = torch.stack([torch.stack([token @ unit[anchor] for anchor in anchors]) for token in unit])
    logits = logits / (0.1 if module.log_tau is None else module.log_tau.exp())
    if module.scalar is not None:
        logits = logits + module.scalar * pooled(previous.detach(), num_tokens, num_merged)
    soft = logits.softmax(dim=1)
    hard = torch.zeros_like(soft)
    for token in range(num_tokens):
        hard[token, anchors.index(token) if token in anchors else int(logits[token].argmax())] = 1
    hard = hard + soft - soft.detach()
    chosen = hard * soft
    return hard, chosen / chosen.sum(dim=0)


def vit(block: nn.Module, x: Tensor, masks: Masks | None) -> tuple[Tensor, Masks]:
    """Of a sample (prefix + N, D)."""
    z = x + block.attn(block.norm1(x)[None])[0]
    _, merging = mask_of(block.mask, z[1:], masks and masks[0])
    merged = torch.cat([z[:1], merging.T @ z[1:]])
    return merged + block.mlp(block.norm2(merged)), [merging]


def mobilevit(block: nn.Module, x: Tensor, masks: Masks | None) -> tuple[Tensor, Masks]:
    """Of a sample (N, D)."""
    z = x + block.attn(block.norm1(x)[None])[0]
    hard, merging = mask_of(block.mask, z, masks and masks[0])
    merged = merging.T @ z
    return hard @ (merged + block.mlp(block.norm2(merged))), [merging]


def swin(block: nn.Module, x: Tensor, masks: Masks | None) -> tuple[Tensor, Masks]:
    """Of a sample (rows, columns, D), by its windows: of 12 places a side 4, of 6 places 3."""
    z = x + block._attn(block.norm1(x)[None])[0]
    side = {12: 4, 6: 3}[len(x)]
    rows, made = [], []
    for top in range(0, len(x), side):
        row = []
        for left in range(0, len(x), side):
            tokens = z[top : top + side, left : left + side].reshape(side * side, -1)
            hard, merging = mask_of(block.mask, tokens, masks and masks[len(made)])
            merged = merging.T @ tokens
            row.append((hard @ (merged + block.mlp(block.norm2(merged)))).reshape(side, side, -1))
            made.append(merging)
        rows.append(torch.cat(row, dim=1))
    return torch.cat(rows), made


def efficientvit(block: nn.Module, x: Tensor, masks: Masks | None) -> tuple[Tensor, Masks]:
    """Of a sample (D, rows, columns)."""
    z = block.context_module(x[None])[0]
    hard, merging = mask_of(block.mask, z.flatten(1).T, masks and masks[0])
    merged, convolutions = merging.T @ z.flatten(1).T, block.local_module.main
    first, last = convolutions.inverted_conv.conv, convolutions.point_conv
    inner = F.hardswish(merged @ first.weight[:, :, 0, 0].T + first.bias)
    inner = convolutions.depth_conv((hard @ inner).T.reshape(1, -1, *x.shape[1:]))[0].flatten(1)
    inner = merging.T @ inner.T @ last.conv.weight[:, :, 0, 0].T
    scale = last.norm.weight / (last.norm.running_var + last.norm.eps).sqrt()
    merged = merged + (inner - last.norm.running_mean) * scale + last.norm.bias
    return (hard @ merged).T.reshape(x.shape), [merging]


BLOCKS: dict[str, Callable[[nn.Module, Tensor, Masks | None], tuple[Tensor, Masks]]] = {
    "ltm_vit_small": vit,
    "ltm_swin_tiny": swin,
    "ltm_mobilevit_xs": mobilevit,
    "ltm_efficientvit_b1": efficientvit,
}
