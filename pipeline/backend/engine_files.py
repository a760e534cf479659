"""Model and optimizer of DDP and FSDP2 as a torch.distributed.checkpoint, which any world can read."""

from pathlib import Path
from typing import Any, cast

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer


def save(model: nn.Module, optimizer: Optimizer, directory: Path, more: dict[str, Tensor]) -> None:
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": states, "more": more}, checkpoint_id=directory)


def load(model: nn.Module, optimizer: Optimizer, directory: Path, more: dict[str, Tensor]) -> None:
    """`more` is loaded in place."""
    weights, states = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": states, "more": more}
    dcp.load(state, checkpoint_id=directory)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """The gathered model on the CPU of rank 0; {} elsewhere."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))
