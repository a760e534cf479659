"""Vision Token Turing Machines (arXiv 2409.07613): `timm.create_model("vittm_base")`, or `ViTTM` itself."""

from pipeline.models.vittm import sizes
from pipeline.models.vittm.model import ViTTM
from pipeline.models.vittm.remap import remap_upstream_state_dict

__all__ = ["ViTTM", "remap_upstream_state_dict", "sizes"]
