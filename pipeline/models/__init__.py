"""The models of this project. Importing this package adds them to timm's registry, and does nothing else."""

from pipeline.models import t2t_vit, vittm

__all__ = ["t2t_vit", "vittm"]
