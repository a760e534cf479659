"""Tokens-to-Token ViT (arXiv 2101.11986): `timm.create_model("t2t_vit_t_14")`, or `T2TViT` itself."""

from pipeline.models.t2t_vit import sizes
from pipeline.models.t2t_vit.model import T2TViT
from pipeline.models.t2t_vit.remap import remap_upstream_state_dict

__all__ = ["T2TViT", "remap_upstream_state_dict", "sizes"]
