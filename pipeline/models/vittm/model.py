"""ViTTM, the Vision Token Turing Machine (arXiv 2409.07613): many cheap memory tokens, few deep process tokens.

Shapes: B batch, Nm/Np memory/process tokens, D width, H heads.
"""

import inspect
from functools import partial
from math import prod
from typing import Any

import torch
from timm.layers import PatchDropout, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block
from torch import nn

from pipeline.models.vittm.checks import check_choice, check_divides, check_image_size, check_known
from pipeline.models.vittm.embed import PatchEmbedder, positions_for
from pipeline.models.vittm.heads import RW_HEADS

EVAL_HEADS = ("memory", "process", "mean", "both")
_LayerNorm = partial(nn.LayerNorm, eps=1e-6)
_Pair = tuple[torch.Tensor, torch.Tensor]


class Layer(nn.Module):
    """Read from memory, think, write to memory: the unit of sharding, compilation and activation checkpointing."""

    def __init__(self, dim: int, read_head: nn.Module, block: nn.Module, write_head: nn.Module) -> None:
        super().__init__()
        self.read_norm = _LayerNorm(dim)
        self.read_head = read_head
        self.block = block
        self.write_norm = _LayerNorm(dim)
        self.write_head = write_head

    def forward(self, memory: torch.Tensor, process: torch.Tensor) -> _Pair:
        """memory (B, Nm, D), process (B, Np, D) -> the same. The norms replace the streams: no skip goes round them."""
        memory, process = self.read_norm(memory), self.read_norm(process)
        process = process + self.read_head(source=memory, query=process)
        process = self.block(process)
        memory, process = self.write_norm(memory), self.write_norm(process)
        memory = memory + self.write_head(source=process, query=memory)
        return memory, process


class ViTTM(nn.Module):
    """Two streams of tokens of one image, each with a classifier; only process tokens run through transformer blocks.

    Sizes of images and patches (`img_size`, `memory_ps`, `process_ps`) are in pixels. Both streams read and write by
    `rw_head_type` heads with queries and keys of width D / `latent_size_scale`. Drop rates: `drop_rate` before the
    classifiers, `pos_drop_rate` after the positions, `patch_drop_rate` on process tokens, `proj_drop_rate`,
    `attn_drop_rate` and `drop_path_rate` (growing with depth) inside the blocks. `init_values` turns LayerScale on.
    `global_pool` "token" moves the memory norm before the pooling, which is a mean either way. `eval_head` says what
    `forward` returns in eval mode, and may be set at any time. `num_classes` 0 gives features in place of logits.

    Raises UserError for options that are unknown, not available, or do not divide as they must.
    """

    def __init__(  # noqa: PLR0913 - timm's convention for models
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        memory_ps: int = 28,
        process_ps: int = 28,
        process_embedder_type: str = "patch",
        rw_head_type: str = "lin",
        latent_size_scale: int = 4,
        fusion_type: str = "residual",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        init_values: float | None = None,
        global_pool: str = "avg",
        eval_head: str = "memory",
        **unknown: object,
    ) -> None:
        super().__init__()
        check_known(unknown, inspect.signature(ViTTM).parameters.keys() - {"unknown"})
        check_choice("process_embedder_type", process_embedder_type, ("patch",))
        check_choice("rw_head_type", rw_head_type, RW_HEADS)
        check_choice("fusion_type", fusion_type, ("residual",))
        check_choice("global_pool", global_pool, ("avg", "token"))
        check_choice("eval_head", eval_head, EVAL_HEADS)
        check_divides("num_heads", num_heads, "embed_dim", embed_dim, "a head takes an equal share of the width")
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.eval_head = eval_head

        self._build_embedders(to_2tuple(img_size), in_chans, memory_ps, process_ps)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.patch_drop = PatchDropout(patch_drop_rate, num_prefix_tokens=0)
        head = partial(RW_HEADS[rw_head_type], embed_dim, num_heads, latent_size_scale)
        block = partial(
            Block, embed_dim, num_heads, mlp_ratio, qkv_bias=True, proj_drop=proj_drop_rate, attn_drop=attn_drop_rate,
            init_values=init_values, norm_layer=_LayerNorm,  # type: ignore[arg-type] # timm takes any callable
        )  # fmt: skip
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.layers = nn.ModuleList(Layer(embed_dim, head(), block(drop_path=rate), head()) for rate in rates)
        self._build_classifiers(num_classes, global_pool, drop_rate)
        self._init_weights()

    def _build_embedders(self, image_size: tuple[int, int], in_chans: int, memory_ps: int, process_ps: int) -> None:
        check_image_size(image_size, memory_ps, process_ps)
        self.memory_embedder = PatchEmbedder(memory_ps, in_chans, self.embed_dim)
        self.process_embedder = PatchEmbedder(process_ps, in_chans, self.embed_dim)
        self.memory_grid = self.memory_embedder.grid(image_size)
        self.process_grid = self.process_embedder.grid(image_size)
        self.memory_pos_embed = nn.Parameter(torch.empty(1, prod(self.memory_grid), self.embed_dim))
        self.process_pos_embed = nn.Parameter(torch.empty(1, prod(self.process_grid), self.embed_dim))

    def _build_classifiers(self, num_classes: int, global_pool: str, drop_rate: float) -> None:
        averaging = global_pool == "avg"
        self.norm = nn.Identity() if averaging else _LayerNorm(self.embed_dim)
        self.process_norm = _LayerNorm(self.embed_dim)
        self.fc_norm = _LayerNorm(self.embed_dim) if averaging else nn.Identity()
        self.fc_norm_process = _LayerNorm(self.embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)

    def _init_weights(self) -> None:
        """What differs from PyTorch's own initialisation; the classifiers are zero already."""
        for table in (self.memory_pos_embed, self.process_pos_embed):
            nn.init.trunc_normal_(table, std=0.02)
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.process_embedder.proj.weight)
        nn.init.zeros_(self.process_embedder.proj.bias)  # type: ignore[arg-type] # it has one

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        """The classifiers of memory and process."""
        return self.head, self.process_head

    def reset_classifier(self, num_classes: int) -> None:
        """Give both streams a new classifier, zero so that the first loss is ln(num_classes) each; 0 removes them."""
        self.num_classes = num_classes
        self.head = self._new_classifier()
        self.process_head = self._new_classifier()

    def _new_classifier(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        table = self.memory_pos_embed
        head = nn.Linear(self.embed_dim, self.num_classes, device=table.device, dtype=table.dtype)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return head

    def embed(self, images: torch.Tensor) -> _Pair:
        """(B, in_chans, height, width) -> memory (B, Nm, D), process (B, Np, D), with their positions.

        Raises UserError for an image that the patch sizes do not divide.
        """
        size = (images.shape[-2], images.shape[-1])
        check_image_size(size, self.memory_embedder.patch_size, self.process_embedder.patch_size)
        memory_pos = positions_for(self.memory_pos_embed, self.memory_grid, self.memory_embedder.grid(size))
        process_pos = positions_for(self.process_pos_embed, self.process_grid, self.process_embedder.grid(size))
        memory = self.pos_drop(self.memory_embedder(images) + memory_pos)
        process = self.pos_drop(self.process_embedder(images) + process_pos)
        return memory, self.patch_drop(process)

    def forward_features(self, x: torch.Tensor) -> _Pair:
        """Images (B, in_chans, height, width) -> memory (B, Nm, D), process (B, Np, D); UserError as in `embed`."""
        memory, process = self.embed(x)
        for layer in self.layers:
            memory, process = layer(memory, process)
        return self.norm(memory), self.process_norm(process)

    def forward_head(self, memory: torch.Tensor, process: torch.Tensor, pre_logits: bool = False) -> _Pair:
        """memory (B, Nm, D), process (B, Np, D) -> logits (B, num_classes) of each, or (B, D) with `pre_logits`."""
        memory = self.head_drop(self.fc_norm(memory.mean(dim=1)))
        process = self.head_drop(self.fc_norm_process(process.mean(dim=1)))
        return (memory, process) if pre_logits else (self.head(memory), self.process_head(process))

    def forward(self, x: torch.Tensor) -> torch.Tensor | _Pair:
        """Images -> (memory logits, process logits) in training; in eval mode what `eval_head` asks for.

        "memory" and "process" give one tensor (B, num_classes), "mean" the mean of the two, "both" the pair.
        """
        memory, process = self.forward_head(*self.forward_features(x))
        if self.training or self.eval_head == "both":
            return memory, process
        check_choice("eval_head", self.eval_head, EVAL_HEADS)
        if self.eval_head == "mean":
            return (memory + process) / 2
        return memory if self.eval_head == "memory" else process


_SIZES: dict[str, dict[str, Any]] = {
    "vittm_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vittm_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vittm_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "vittm_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}
_CFG = {"crop_pct": 224 / 256, "classifier": ("head", "process_head")}
default_cfgs = generate_default_cfgs({name: _CFG for name in _SIZES})


def _create(name: str, pretrained: bool, keywords: dict[str, Any]) -> ViTTM:
    return build_model_with_cfg(ViTTM, name, pretrained, **{**_SIZES[name], **keywords})


@register_model
def vittm_tiny(pretrained: bool = False, **keywords: Any) -> ViTTM:
    """ViTTM with the width, depth and heads of ViT-Ti."""
    return _create("vittm_tiny", pretrained, keywords)


@register_model
def vittm_small(pretrained: bool = False, **keywords: Any) -> ViTTM:
    """ViTTM with the width, depth and heads of ViT-S."""
    return _create("vittm_small", pretrained, keywords)


@register_model
def vittm_base(pretrained: bool = False, **keywords: Any) -> ViTTM:
    """ViTTM with the width, depth and heads of ViT-B."""
    return _create("vittm_base", pretrained, keywords)


@register_model
def vittm_large(pretrained: bool = False, **keywords: Any) -> ViTTM:
    """ViTTM with the width, depth and heads of ViT-L."""
    return _create("vittm_large", pretrained, keywords)
