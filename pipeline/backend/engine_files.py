"""Model and optimizer of DDP and FSDP2 as a torch.distributed.checkpoint, which any world can read."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

EngineWriter = Callable[[Path, ProcessGroup | None], None]


def save(model: nn.Module, optimizer: Optimizer, directory: Path, more: dict[str, Tensor]) -> None:
    dcp.save(_state(model, optimizer, more), checkpoint_id=directory)


def stage(model: nn.Module, optimizer: Optimizer, more: dict[str, Tensor]) -> EngineWriter:
    """Copies all into CPU memory; what is returned writes the copy as `save` would."""
    state = in_memory(_state(model, optimizer, more))

    def write(directory: Path, group: ProcessGroup | None) -> None:
        dcp.save(state, checkpoint_id=directory, process_group=group)

    return write


def load(model: nn.Module, optimizer: Optimizer, directory: Path, more: dict[str, Tensor]) -> None:
    """`more` is loaded in place."""
    state = _state(model, optimizer, more)
    dcp.load(state, checkpoint_id=directory)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """The gathered model on the CPU of rank 0; {} elsewhere."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))


def in_memory(state: Any) -> Any:
    """A copy whose tensors, shards among them, are on the CPU and share nothing with those of `state`."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: in_memory(value) for name, value in state.items()}
    return [in_memory(value) for value in state] if isinstance(state, list) else copy.deepcopy(state)


def _state(model: nn.Module, optimizer: Optimizer, more: dict[str, Tensor]) -> dict[str, Any]:
    weights, states = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": states, "more": more}
