"""Trained weights for other programs: timm's files, a model card, ONNX and torch.export."""

from pipeline.export.card import Licences
from pipeline.export.source import Source, find
from pipeline.export.write import Formats, write

__all__ = ["Formats", "Licences", "Source", "find", "write"]
