"""Optimizers and the learning rate."""

from torch import nn
from torch.optim import Optimizer

from pipeline.optim import table
from pipeline.optim.groups import Groups, check_partition, group
from pipeline.optim.schedule import WarmupCosine
from pipeline.recipe import Optimizer as Section

__all__ = ["Groups", "WarmupCosine", "adamw", "group", "make_optimizer", "table"]


def make_optimizer(model: nn.Module, section: Section, groups: Groups) -> Optimizer:
    """The section's optimizer for the model, whose parameters a backend may have sharded since `groups` were made.

    Weight decay is on every parameter (norms, biases and position tables included, as the authors of ViTTM do) but for
    those that `groups` leaves undecayed.
    """
    entry = table.find(section.name)
    optimizer = entry.make(groups.bind(model, entry.split_hidden), section)
    check_partition(model, optimizer)
    return optimizer


def adamw(model: nn.Module, betas: tuple[float, float], eps: float, weight_decay: float) -> Optimizer:
    """AdamW for all of a model that is not sharded yet."""
    section = Section(betas=betas, eps=eps, weight_decay=weight_decay)
    return make_optimizer(model, section, group(model, layer_decay=1.0))
