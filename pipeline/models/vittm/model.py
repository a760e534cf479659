"""ViTTM, the Vision Token Turing Machine (arXiv 2409.07613): many cheap memory tokens, few deep process tokens.

Shapes: B batch, Nm/Np memory/process tokens, D width, H heads.
"""

import inspect
from collections.abc import Sequence
from functools import partial
from math import prod

import torch
from timm.layers import PatchDropout, to_2tuple
from timm.models import checkpoint
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pipeline.models.vittm.checks import (
    check_choice,
    check_divides,
    check_exclusions,
    check_image_size,
    check_known,
    check_same_tokens,
    sized_by_tokens,
)
from pipeline.models.vittm.embed import EmbedOptions, Grid, positions_for
from pipeline.models.vittm.fusion import build_fusion
from pipeline.models.vittm.heads import HeadOptions
from pipeline.models.vittm.layer import DropRates, Layer, LayerNorm
from pipeline.models.vittm.memory import MemoryOptions
from pipeline.models.vittm.timm_interface import TimmInterface

EVAL_HEADS = ("memory", "process", "mean", "both")
_Pair = tuple[Tensor, Tensor]


class ViTTM(TimmInterface, nn.Module):
    """Two streams of tokens of one image, each with a classifier; only process tokens run through transformer blocks.

    Sizes of images and patches (`img_size`, `memory_ps`, `process_ps`) are in pixels. Process tokens are patches,
    memory tokens averaged to `process_tokens` x `process_tokens` ("downsample"), or `process_tokens` learned vectors
    ("latent"). Streams read and write by heads (`rw_head_type`): lin, la and lca with queries and keys of width
    D // `latent_size_scale`, ca, tl, and dyna with `dyna_num_heads` heads of `reduced_dim` features a token, over both
    streams or, without `dyna_concat`, the source alone. `fusion_type` says how what was read joins its stream, and
    `memory_blocks` ("mlp" with `memory_mlp_ratio`, "conv" with its depths and downsamplings) what memory goes through.

    Drop rates: `drop_rate` before the classifiers, `pos_drop_rate` after the positions, `patch_drop_rate` on process
    tokens, `proj_drop_rate`, `attn_drop_rate` and `drop_path_rate` (growing with depth) inside the blocks.
    `init_values` turns LayerScale on. `global_pool` "token" moves the memory norm before the pooling, which is a mean
    either way. `eval_head` says what `forward` returns in eval mode, and may be set at any time. `num_classes` 0 gives
    features in place of logits.

    Raises UserError for options that are unknown, do not divide as they must, or exclude each other.
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
        process_tokens: int | None = None,
        process_embedder_type: str = "patch",
        rw_head_type: str = "lin",
        latent_size_scale: int = 4,
        fusion_type: str = "residual",
        memory_blocks: str | None = None,
        memory_mlp_ratio: float = 0.5,
        memory_encoder_depths: Sequence[int] = (3, 3),
        memory_encoder_downsamples: Sequence[int] = (2, 1),
        memory_decoder_depths: Sequence[int] = (3, 3),
        reduced_dim: int = 2,
        dyna_num_heads: int = 16,
        dyna_concat: bool = True,
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
        check_choice("eval_head", eval_head, EVAL_HEADS)
        check_exclusions(fusion_type, rw_head_type, dyna_concat, patch_drop_rate)
        check_divides("num_heads", num_heads, "embed_dim", embed_dim, "a head takes an equal share of the width")
        embed = EmbedOptions(
            to_2tuple(img_size), in_chans, memory_ps, process_ps, process_tokens, process_embedder_type
        )
        heads = HeadOptions(rw_head_type, num_heads, latent_size_scale, reduced_dim, dyna_num_heads, dyna_concat)
        stages = (tuple(memory_encoder_depths), tuple(memory_encoder_downsamples), tuple(memory_decoder_depths))
        memory = MemoryOptions(memory_blocks, memory_mlp_ratio, *stages)
        rates = DropRates(drop_rate, pos_drop_rate, patch_drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate)
        block = partial(
            Block, embed_dim, num_heads, mlp_ratio, qkv_bias=True, proj_drop=proj_drop_rate, attn_drop=attn_drop_rate,
            init_values=init_values, norm_layer=LayerNorm,  # type: ignore[arg-type] # timm takes any callable
        )  # fmt: skip
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.eval_head, self.grad_checkpointing = eval_head, False
        self.pos_drop, self.head_drop = nn.Dropout(pos_drop_rate), nn.Dropout(drop_rate)
        self.patch_drop = PatchDropout(patch_drop_rate, num_prefix_tokens=0)
        self._build_embedders(embed)
        self._build_layers([block(drop_path=rate) for rate in rates.paths(depth)], heads, fusion_type, memory)
        self._build_classifiers(num_classes, global_pool)
        self._init_weights()

    def _build_embedders(self, options: EmbedOptions) -> None:
        self.patch_sizes = options.patch_sizes
        self.memory_embedder = options.build_memory(self.embed_dim)
        self.process_embedder = options.build_process(self.embed_dim)
        self.grids = self.grids_of(options.image_size)
        self.memory_pos_embed, self.process_pos_embed = (
            nn.Parameter(torch.empty(1, prod(grid), self.embed_dim)) for grid in self.grids
        )

    def _build_layers(self, blocks: list[Block], heads: HeadOptions, fusion_type: str, memory: MemoryOptions) -> None:
        """The layers, and a fusion for each direction, which all of them share."""
        num_memory, num_process = map(prod, self.grids)
        num_written = memory.num_written(num_memory)
        self.read_fusion = build_fusion(fusion_type, self.embed_dim, num_process)
        self.write_fusion = build_fusion(fusion_type, self.embed_dim, num_written)
        self.sized_by = sized_by_tokens(fusion_type, heads.rw_head_type)
        read = partial(heads.build, self.embed_dim, num_source=num_memory, num_query=num_process)
        write = partial(heads.build, self.embed_dim, num_source=num_process, num_query=num_written)
        self.layers = nn.ModuleList(
            Layer(self.embed_dim, read(), block, write(), memory.build(self.embed_dim)) for block in blocks
        )

    def _build_classifiers(self, num_classes: int, global_pool: str) -> None:
        self.process_norm = LayerNorm(self.embed_dim)
        self.fc_norm_process = LayerNorm(self.embed_dim)
        self._build_memory_norms(global_pool)
        self.reset_classifier(num_classes)

    def _build_memory_norms(self, global_pool: str) -> None:
        check_choice("global_pool", global_pool, ("avg", "token"))
        table = self.memory_pos_embed
        norm = LayerNorm(self.embed_dim, device=table.device, dtype=table.dtype)
        self.global_pool = global_pool
        self.norm, self.fc_norm = (nn.Identity(), norm) if global_pool == "avg" else (norm, nn.Identity())

    def _init_weights(self) -> None:
        """What differs from PyTorch's own initialisation; the classifiers are zero already."""
        for table in (self.memory_pos_embed, self.process_pos_embed):
            nn.init.trunc_normal_(table, std=0.02)
        for module in (*self.layers.modules(), *self.read_fusion.modules(), *self.write_fusion.modules()):
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.process_embedder.init_process()

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        """The classifiers of memory and process."""
        return self.head, self.process_head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give both streams a new classifier, zero so that the first loss is ln(num_classes) each; 0 removes them.

        Another `global_pool` than the present one also brings a new norm of memory.
        """
        if global_pool not in (None, self.global_pool):
            self._build_memory_norms(global_pool)
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

    def embed(self, images: Tensor) -> _Pair:
        """(B, in_chans, height, width) -> memory (B, Nm, D), process (B, Np, D), with their positions.

        Raises UserError for an image that the patch sizes do not divide, and for one of another size than `img_size`
        where weights are sized by the number of tokens.
        """
        size = (images.shape[-2], images.shape[-1])
        check_image_size(size, self.patch_sizes)
        grids = self.grids_of(size)
        check_same_tokens(self.sized_by, self.grids, grids)
        memory = self.memory_embedder(images)
        process = self.process_embedder(images, memory, grids[0])
        memory = self.pos_drop(memory + positions_for(self.memory_pos_embed, self.grids[0], grids[0]))
        process = self.pos_drop(process + positions_for(self.process_pos_embed, self.grids[1], grids[1]))
        return memory, self.patch_drop(process)

    def grids_of(self, image_size: Grid) -> tuple[Grid, Grid]:
        """Of memory and process tokens."""
        return self.memory_embedder.grid(image_size), self.process_embedder.grid(image_size)

    def forward_features(self, x: Tensor) -> _Pair:
        """Images (B, in_chans, height, width) -> memory (B, Nm, D), process (B, Np, D); UserError as in `embed`."""
        memory, process = self.embed(x)
        for layer in self.layers:
            memory, process = self.run_layer(layer, memory, process)
        return self.norm(memory), self.process_norm(process)

    def run_layer(self, layer: nn.Module, memory: Tensor, process: Tensor) -> _Pair:
        arguments = (memory, process, self.read_fusion, self.write_fusion)
        return checkpoint(layer, *arguments) if self.grad_checkpointing else layer(*arguments)

    def forward_head(self, memory: Tensor, process: Tensor, pre_logits: bool = False) -> _Pair:
        """memory (B, Nm, D), process (B, Np, D) -> logits (B, num_classes) of each, or (B, D) with `pre_logits`."""
        memory = self.head_drop(self.fc_norm(memory.mean(dim=1)))
        process = self.head_drop(self.fc_norm_process(process.mean(dim=1)))
        return (memory, process) if pre_logits else (self.head(memory), self.process_head(process))

    def forward(self, x: Tensor) -> Tensor | _Pair:
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
