"""The models of this project. Importing this package adds them to timm's registry, and does nothing else."""

from pipeline.models import ltm, t2t_vit, vittm

__all__ = ["ltm", "t2t_vit", "vittm"]
