"""The models of this project. Importing this package adds them to timm's registry, and does nothing else."""

from pipeline.models import vittm

__all__ = ["vittm"]
