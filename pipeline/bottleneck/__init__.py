"""Training against an information bottleneck, as LTM does: the loss, and what it has to know of each epoch."""

from pipeline.bottleneck.bottleneck import make_bottleneck
from pipeline.bottleneck.loss import make_objective

__all__ = ["make_bottleneck", "make_objective"]
