"""The seven models in timm's registry; `pretrained` takes timm's weights of the model without merging."""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, register_model
from timm.models.mobilevit import model_cfgs
from timm.models.swin_transformer import checkpoint_filter_fn as swin_filter
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter

from pipeline.models.ltm.models import LTM, LTMEfficientViT, LTMMobileViT, LTMSwin, LTMViT

BASES = {
    "ltm_vit_small": "vit_small_patch16_224",
    "ltm_vit_base": "vit_base_patch16_224",
    "ltm_swin_tiny": "swin_tiny_patch4_window7_224",
    "ltm_swin_base": "swin_base_patch4_window7_224",
    "ltm_mobilevit_xs": "mobilevit_xs",
    "ltm_mobilevit_s": "mobilevit_s",
    "ltm_efficientvit_b1": "efficientvit_b1",
}
"""timm's models without merging: a ratio of 1 is these."""

_CFGS = {name: get_pretrained_cfg(base) for name, base in BASES.items()}
default_cfgs = generate_default_cfgs({name: cfg for name, cfg in _CFGS.items() if cfg is not None})


def _vit(name: str, pretrained: bool, options: dict[str, Any]) -> LTM:
    feature_cfg = {"out_indices": 3, "feature_cls": "getter"}
    return build_model_with_cfg(
        LTMViT, name, pretrained, pretrained_filter_fn=vit_filter, feature_cfg=feature_cfg, **options
    )


def _swin(name: str, pretrained: bool, options: dict[str, Any]) -> LTM:
    feature_cfg = {"flatten_sequential": True}
    return build_model_with_cfg(
        LTMSwin, name, pretrained, pretrained_filter_fn=swin_filter, feature_cfg=feature_cfg, **options
    )


def _mobilevit(name: str, pretrained: bool, options: dict[str, Any]) -> LTM:
    cfg, feature_cfg = model_cfgs[BASES[name]], {"flatten_sequential": True}
    return build_model_with_cfg(LTMMobileViT, name, pretrained, model_cfg=cfg, feature_cfg=feature_cfg, **options)


def _efficientvit(name: str, pretrained: bool, options: dict[str, Any]) -> LTM:
    feature_cfg = {"flatten_sequential": True, "out_indices": (0, 1, 2, 3)}
    return build_model_with_cfg(LTMEfficientViT, name, pretrained, feature_cfg=feature_cfg, **options)


@register_model
def ltm_vit_small(pretrained: bool = False, **keywords: Any) -> LTM:
    """ViT-S/16."""
    options = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return _vit("ltm_vit_small", pretrained, options | keywords)


@register_model
def ltm_vit_base(pretrained: bool = False, **keywords: Any) -> LTM:
    """ViT-B/16."""
    options = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return _vit("ltm_vit_base", pretrained, options | keywords)


@register_model
def ltm_swin_tiny(pretrained: bool = False, **keywords: Any) -> LTM:
    """Swin-T, with windows of 7."""
    options = {"patch_size": 4, "window_size": 7, "embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
    return _swin("ltm_swin_tiny", pretrained, options | keywords)


@register_model
def ltm_swin_base(pretrained: bool = False, **keywords: Any) -> LTM:
    """Swin-B, with windows of 7."""
    sizes = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
    return _swin("ltm_swin_base", pretrained, {"patch_size": 4, "window_size": 7} | sizes | keywords)


@register_model
def ltm_mobilevit_xs(pretrained: bool = False, **keywords: Any) -> LTM:
    """MobileViT-XS."""
    return _mobilevit("ltm_mobilevit_xs", pretrained, keywords)


@register_model
def ltm_mobilevit_s(pretrained: bool = False, **keywords: Any) -> LTM:
    """MobileViT-S."""
    return _mobilevit("ltm_mobilevit_s", pretrained, keywords)


@register_model
def ltm_efficientvit_b1(pretrained: bool = False, **keywords: Any) -> LTM:
    """EfficientViT-B1 of MIT's."""
    sizes = {"widths": (16, 32, 64, 128, 256), "depths": (1, 2, 3, 3, 4), "head_dim": 16, "head_widths": (1536, 1600)}
    return _efficientvit("ltm_efficientvit_b1", pretrained, sizes | keywords)
