"""Where ZeRO keeps the fp32 weights that it updates: a rank's partition, as pieces of parameters.

Stages 1 and 2 lay the parameters of a group one after the other and cut that into one range a rank; stage 3 cuts every
parameter into equal ranges, the last of them padded. `engine` is DeepSpeed's.
"""

from typing import Any

from torch import Tensor

from pipeline.sharded import Shard


def shard_of(name: str, parameter: Any, engine: Any) -> Shard:
    """This rank's piece of a trainable parameter."""
    return (_piece_of_3 if engine.zero_optimization_partition_weights() else _piece_of_1_and_2)(name, parameter, engine)


def share(engine: Any) -> None:
    """Stage 3 updates fp32 weights where they lie. DeepSpeed means to (stage3.py, "we don't need another copy"), but
    compares a torch.device with the name of one, which are never equal, and keeps the copy."""
    if not engine.zero_optimization_partition_weights():
        return
    partitions = engine.optimizer.fp16_partitioned_groups_flat, engine.optimizer.fp32_partitioned_groups_flat
    for weights, updated in zip(*partitions, strict=True):
        if (weights.dtype, weights.device) == (updated.dtype, updated.device):
            updated.data = weights.data


def publish(engine: Any) -> None:
    """Copies the partitions to the weights that the model computes with, and gathers those that every rank keeps."""
    optimizer = engine.optimizer
    if not engine.zero_optimization_partition_weights():
        optimizer.update_lp_params()
        return
    optimizer.parameter_offload.partition_all_parameters()
    partitions = optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat
    for weights, updated in zip(*partitions, strict=True):
        weights.data.copy_(updated.data)
    kept = optimizer.persistent_parameters
    if kept:
        kept[0].all_gather(kept)


def full_weights(engine: Any) -> dict[str, Tensor]:
    """The whole model on the CPU of rank 0, its fp32 weights gathered one at a time; {} elsewhere."""
    from deepspeed.runtime.zero import GatheredParameters  # not above: DeepSpeed speaks when it is imported
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        with GatheredParameters(tensor, enabled=hasattr(tensor, "ds_id")):
            whole = safe_get_full_fp32_param(tensor) if tensor.requires_grad else tensor
            if engine.global_rank == 0:
                found[name] = whole.detach().cpu().clone()
    return found


def num_elements(parameter: Any) -> int:
    """Of the whole parameter, also where this rank holds a part of it."""
    return getattr(parameter, "ds_numel", parameter.numel())


def _piece_of_1_and_2(name: str, parameter: Any, engine: Any) -> Shard:
    held = parameter._hp_mapping
    if held is None:
        return Shard(name, parameter.detach().new_empty(0), 0, parameter.numel())
    return Shard(name, held.hp_fragment.detach(), held.lp_fragment_address.start, parameter.numel())


def _piece_of_3(name: str, parameter: Any, engine: Any) -> Shard:
    optimizer, total = engine.optimizer, parameter.ds_numel
    group, start, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
    offset = min(engine.global_rank * length, total)
    partition = optimizer.fp32_partitioned_groups_flat[group].detach()
    return Shard(name, partition.narrow(0, start, min(length, total - offset)), offset, total)
