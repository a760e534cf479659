"""Optimizers and the learning rate."""

import torch
from torch import nn

from pipeline.optim.schedule import WarmupCosine

__all__ = ["WarmupCosine", "adamw"]


def adamw(model: nn.Module, betas: tuple[float, float], eps: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with decay on every parameter (norms, biases and position tables included, as the authors of ViTTM do),
    fused on CUDA. The learning rate is set before each step, so none is given here."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = all(parameter.is_cuda for parameter in parameters)
    return torch.optim.AdamW(parameters, lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)
