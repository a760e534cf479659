"""LTM, learnable token merging (arXiv 2407.15219), on timm's ViT, Swin, MobileViT and EfficientViT.

The authors' public code has no such block, so that this one is our declared design: from what the paper says of it, a
mask of about one large entry a row, of the tokens after the attention and the mask of the block before, by which N
tokens merge into ceil(0.8 N). What the paper measured is no promise of this one.
"""

from pipeline.models.ltm import sizes
from pipeline.models.ltm.models import LTM

__all__ = ["LTM", "sizes"]
