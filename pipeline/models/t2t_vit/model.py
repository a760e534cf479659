"""T2T-ViT: timm's ViT whose patches are made by the Tokens-to-Token module, at fixed positions.

Shapes: B batch, N tokens, D width.
"""

from functools import partial
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pipeline.models.t2t_vit.tokens import LAYER_NORM_EPS, REDUCTION, Grid, TokensToToken, grid_of
from shards.errors import UserError


class T2TViT(VisionTransformer):
    """`tokens_to_token` makes tokens (B, N, D) of images of any size; the rest is timm's ViT, with its interface.

    `img_size` is in pixels, `token_dim` the width inside the T2T module, whose layers are `tokens_type`, "transformer"
    or "performer". `qk_scale` is what products of queries and keys are multiplied by in the blocks: None takes
    (D / num_heads)^-0.5, and weights that the authors published were trained with D^-0.5. Rates, `init_values` and
    `global_pool` are those of timm's ViT. Positions are a sinusoid, interpolated for other sizes than `img_size`.

    Raises UserError for sizes that cannot be, and TypeError for options that it does not have.
    """

    def __init__(  # noqa: PLR0913 - timm's convention for models
        self,
        img_size: int | Grid = 224,
        *,
        tokens_type: str = "transformer",
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 14,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        token_dim: int = 64,
        drop_path_rate: float = 0.0,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        init_values: float | None = None,
        global_pool: Any = "token",
    ) -> None:
        if num_heads < 1 or embed_dim % num_heads:
            raise UserError(
                f"num_heads={num_heads} does not divide embed_dim={embed_dim}: a head takes an equal share of the "
                "width; change one of them."
            )
        rates = {
            "drop_rate": drop_rate, "pos_drop_rate": pos_drop_rate, "patch_drop_rate": patch_drop_rate,
            "proj_drop_rate": proj_drop_rate, "attn_drop_rate": attn_drop_rate, "drop_path_rate": drop_path_rate,
        }  # fmt: skip
        tokens = partial(_embed, tokens_type=tokens_type, token_dim=token_dim)
        super().__init__(
            to_2tuple(img_size), REDUCTION, in_chans, num_classes, global_pool, embed_dim, depth, num_heads, mlp_ratio,
            qkv_bias=False, init_values=init_values, dynamic_img_size=True, embed_layer=tokens,
            norm_layer=partial(nn.LayerNorm, eps=LAYER_NORM_EPS), **rates,  # type: ignore[arg-type] # more than LayerType
        )  # fmt: skip
        assert self.cls_token is not None
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        del self.pos_embed
        length = self.patch_embed.num_patches + self.num_prefix_tokens
        self.register_buffer("pos_embed", sinusoid(length, embed_dim))
        if qk_scale is not None:
            for block in self.blocks:
                block.attn.q_norm = Scale(qk_scale * (embed_dim // num_heads) ** 0.5)  # type: ignore[union-attr]

    @property
    def patch_embed(self) -> "TokenMap":
        """The T2T module, as timm's ViT calls what makes its patches."""
        return TokenMap(self.tokens_to_token)

    @patch_embed.setter
    def patch_embed(self, embed: "TokenMap") -> None:
        self.tokens_to_token = embed.tokens_to_token

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns by which timm groups parameters by depth."""
        return super().group_matcher(coarse) | {"stem": r"^cls_token|pos_embed|tokens_to_token"}


class Scale(nn.Module):
    """x -> factor * x, where timm's attention would norm its queries: its fused kernels take no other scale."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class TokenMap:
    """A T2T module with the face of timm's PatchEmbed of dynamic size."""

    def __init__(self, tokens_to_token: TokensToToken) -> None:
        self.tokens_to_token = tokens_to_token

    def __call__(self, images: Tensor) -> Tensor:
        """(B, in_chans, height, width) -> (B, rows, columns, D)."""
        return self.tokens_to_token(images).unflatten(1, self.dynamic_feat_size((images.shape[-2], images.shape[-1])))

    @property
    def grid_size(self) -> Grid:
        return self.tokens_to_token.grid_size

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    def dynamic_feat_size(self, img_size: Grid) -> Grid:
        return grid_of(img_size)


def _embed(
    *, img_size: Grid, in_chans: int, embed_dim: int, tokens_type: str, token_dim: int, **_of_patches: object
) -> TokenMap:
    """What timm's ViT calls to make its patch embedding; other options than these are about square patches."""
    return TokenMap(TokensToToken(img_size, tokens_type, in_chans, token_dim, embed_dim))


def sinusoid(length: int, dim: int) -> Tensor:
    """(1, length, dim): at position p, sin and cos in turn of p / 10000^(2 floor(j / 2) / dim)."""
    columns = torch.arange(dim)
    rates = 10000.0 ** (-2 * (columns // 2).double() / dim)
    angles = torch.arange(length).double().unsqueeze(1) * rates
    return torch.where(columns % 2 == 0, angles.sin(), angles.cos()).float().unsqueeze(0)
