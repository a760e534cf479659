"""Which model, and its options."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Model:
    name: str = "vittm_base"
    """A model of timm's registry. An option below that is None is left to the model; one that it lacks is refused."""
    memory_ps: int | None = None
    """ViTTM: side of a memory patch, in pixels."""
    process_ps: int | None = None
    """ViTTM: side of a process patch, in pixels."""
    process_embedder_type: str | None = None
    """ViTTM: where process tokens come from: patch, downsample or latent."""
    process_tokens: int | None = None
    """ViTTM: number of latent process tokens, or side of the grid that memory is averaged to."""
    rw_head_type: str | None = None
    """ViTTM: read-write head: lin, ca, la, lca, tl or dyna."""
    latent_size_scale: int | None = None
    """ViTTM: width over the latent width of the read-write head."""
    reduced_dim: int | None = None
    """ViTTM: features a token and head of dyna."""
    dyna_num_heads: int | None = None
    """ViTTM: heads of dyna."""
    dyna_concat: bool | None = None
    """ViTTM: whether dyna weighs the tokens of both streams, or those of the source alone."""
    fusion_type: str | None = None
    """ViTTM: how what was read or written joins its stream: residual, erase or add_erase."""
    memory_blocks: str | None = None
    """ViTTM: what memory goes through in a layer: mlp or conv."""
    memory_mlp_ratio: float | None = None
    """ViTTM: hidden width of memory's MLP over the width."""
    memory_encoder_depths: tuple[int, ...] | None = None
    """ViTTM: blocks of each stage of memory's convolutional encoder."""
    memory_encoder_downsamples: tuple[int, ...] | None = None
    """ViTTM: stride of each stage of it."""
    memory_decoder_depths: tuple[int, ...] | None = None
    """ViTTM: blocks of each stage of the decoder."""
    tokens_type: str | None = None
    """T2T-ViT: layers of its T2T module: transformer or performer."""
    token_dim: int | None = None
    """T2T-ViT: width of a token in its T2T module."""
    qk_scale: float | None = None
    """T2T-ViT: factor of the products of queries and keys in its blocks, for weights that its authors published
    embed_dim^-0.5; None: (embed_dim / num_heads)^-0.5."""
    compression_ratio: float | None = None
    """LTM: share of its tokens that a block keeps, above 0; 1: all, as in the model without merging."""
    width_factor: float | None = None
    """LTM's Swin and EfficientViT, and MobileViT's convolutions: widths over those of the size."""
    patch_size: int | None = None
    """ViT and DeiT: side of a patch, in pixels."""
    embed_dim: int | None = None
    """Width."""
    depth: int | None = None
    """Number of blocks."""
    num_heads: int | None = None
    """Attention heads a block."""
    mlp_ratio: float | None = None
    """Hidden width of a block's MLP over the width."""
    init_values: float | None = None
    """Start of LayerScale."""
    global_pool: str | None = None
    """How tokens become features: of ViTTM avg or token, of timm's models as these have it."""
    drop_rate: float | None = None
    """Dropout before the classifiers."""
    pos_drop_rate: float | None = None
    """Dropout after the positions."""
    patch_drop_rate: float | None = None
    """Share of patches left out in training; of ViTTM, of process tokens."""
    proj_drop_rate: float | None = None
    """Dropout after the projections of a block."""
    attn_drop_rate: float | None = None
    """Dropout of attention weights in a block."""
    drop_path_rate: float | None = None
    """Stochastic depth of the last block."""
    start: str = ""
    """A safetensors file of a whole model to start from, with new classification heads; empty: as init_from says."""
    init_from: Literal["none", "blocks", "blocks+flexi"] = "none"
    """ViTTM: start from scratch; or with the transformer blocks of timm's ViT of the same size, fine-tuned on
    ImageNet-1k; or with those and its patch convolution, resized."""
    init_weights: str = ""
    """init_from: a safetensors file of that ViT, under timm's names; empty downloads it."""
