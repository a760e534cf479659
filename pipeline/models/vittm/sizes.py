"""The sizes of ViTTM in timm's registry: `timm.create_model("vittm_base")`."""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from pipeline.models.vittm.model import ViTTM

_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}
_LAYER_SCALE = 1e-6  # of DeiT III
_CFG = {"crop_pct": 224 / 256, "classifier": ("head", "process_head"), "input_size": (3, 224, 224)}
default_cfgs = generate_default_cfgs({f"{family}_{size}": _CFG for family in ("vittm", "deittm") for size in _SIZES})


def _create(name: str, pretrained: bool, keywords: dict[str, Any], **options: Any) -> ViTTM:
    size = _SIZES[name.partition("_")[2]]
    features = {"out_indices": 3, "feature_cls": "getter"}
    return build_model_with_cfg(ViTTM, name, pretrained, feature_cfg=features, **{**size, **options, **keywords})


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


@register_model
def deittm_tiny(pretrained: bool = False, **keywords: Any) -> ViTTM:
    """The same as vittm_tiny."""
    return _create("deittm_tiny", pretrained, keywords)


@register_model
def deittm_small(pretrained: bool = False, **keywords: Any) -> ViTTM:
    """vittm_small with LayerScale."""
    return _create("deittm_small", pretrained, keywords, init_values=_LAYER_SCALE)


@register_model
def deittm_base(pretrained: bool = False, **keywords: Any) -> ViTTM:
    """vittm_base with LayerScale."""
    return _create("deittm_base", pretrained, keywords, init_values=_LAYER_SCALE)


@register_model
def deittm_large(pretrained: bool = False, **keywords: Any) -> ViTTM:
    """vittm_large with LayerScale."""
    return _create("deittm_large", pretrained, keywords, init_values=_LAYER_SCALE)
