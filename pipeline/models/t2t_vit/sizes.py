"""The sizes of T2T-ViT in timm's registry: `t2t_vit_t_14` has transformer token layers, `t2t_vit_14` performer ones."""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from pipeline.models.t2t_vit.model import T2TViT

_SIZES: dict[str, dict[str, Any]] = {
    "7": {"embed_dim": 256, "depth": 7, "num_heads": 4, "mlp_ratio": 2.0},
    "10": {"embed_dim": 256, "depth": 10, "num_heads": 4, "mlp_ratio": 2.0},
    "12": {"embed_dim": 256, "depth": 12, "num_heads": 4, "mlp_ratio": 2.0},
    "14": {"embed_dim": 384, "depth": 14, "num_heads": 6, "mlp_ratio": 3.0},
    "19": {"embed_dim": 448, "depth": 19, "num_heads": 7, "mlp_ratio": 3.0},
    "24": {"embed_dim": 512, "depth": 24, "num_heads": 8, "mlp_ratio": 3.0},
}
_TOKENS_TYPES = {"t2t_vit_t": "transformer", "t2t_vit": "performer"}
_CFG = {"crop_pct": 224 / 248, "classifier": "head", "input_size": (3, 224, 224)}
default_cfgs = generate_default_cfgs({f"{family}_{size}": _CFG for family in _TOKENS_TYPES for size in _SIZES})


def _create(name: str, pretrained: bool, keywords: dict[str, Any]) -> T2TViT:
    family, _, size = name.rpartition("_")
    options = {"tokens_type": _TOKENS_TYPES[family], **_SIZES[size], **keywords}
    return build_model_with_cfg(
        T2TViT, name, pretrained, feature_cfg={"out_indices": 3, "feature_cls": "getter"}, **options
    )


@register_model
def t2t_vit_t_7(pretrained: bool = False, **keywords: Any) -> T2TViT:
    """T2T-ViT-7 with transformer token layers."""
    return _create("t2t_vit_t_7", pretrained, keywords)


@register_model
def t2t_vit_t_10(pretrained: bool = False, **keywords: Any) -> T2TViT:
    """T2T-ViT-10 with transformer token layers."""
    return _create("t2t_vit_t_10", pretrained, keywords)


@register_model
def t2t_vit_t_12(pretrained: bool = False, **keywords: Any) -> T2TViT:
    """T2T-ViT-12 with transformer token layers."""
    return _create("t2t_vit_t_12", pretrained, keywords)


@register_model
def t2t_vit_t_14(pretrained: bool = False, **keywords: Any) -> T2TViT:
    """T2T-ViT-14 with transformer token layers."""
    return _create("t2t_vit_t_14", pretrained, keywords)


@register_model
def t2t_vit_t_19(pretrained: bool = False, **keywords: Any) -> T2TViT:
    """T2T-ViT-19 with transformer token layers."""
    return _create("t2t_vit_t_19", pretrained, keywords)


@register_model
def t2t_vit_t_24(pretrained: bool = False, **keywords: Any) -> T2TViT:
    """T2T-ViT-24 with transformer token layers."""
    return _create("t2t_vit_t_24", pretrained, keywords)


@register_model
def t2t_vit_7(pretrained: bool = False, **keywords: Any) -> T2TViT:
    """T2T-ViT-7 with performer token layers."""
    return _create("t2t_vit_7", pretrained, keywords)


@register_model
def t2t_vit_10(pretrained: bool = False, **keywords: Any) -> T2TViT:
    """T2T-ViT-10 with performer token layers."""
    return _create("t2t_vit_10", pretrained, keywords)


@register_model
def t2t_vit_12(pretrained: bool = False, **keywords: Any) -> T2TViT:
    """T2T-ViT-12 with performer token layers."""
    return _create("t2t_vit_12", pretrained, keywords)


@register_model
def t2t_vit_14(pretrained: bool = False, **keywords: Any) -> T2TViT:
    """T2T-ViT-14 with performer token layers."""
    return _create("t2t_vit_14", pretrained, keywords)


@register_model
def t2t_vit_19(pretrained: bool = False, **keywords: Any) -> T2TViT:
    """T2T-ViT-19 with performer token layers."""
    return _create("t2t_vit_19", pretrained, keywords)


@register_model
def t2t_vit_24(pretrained: bool = False, **keywords: Any) -> T2TViT:
    """T2T-ViT-24 with performer token layers."""
    return _create("t2t_vit_24", pretrained, keywords)
