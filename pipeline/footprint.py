"""What a run takes of memory and of disk, from the shapes of its parameters alone; nothing of it is allocated."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Size, Tensor, nn
from torch._subclasses import FakeTensorMode

from pipeline import optim
from pipeline.backend.layers import layers, prepare_layers
from pipeline.models.build import make_model
from pipeline.optim.blocks import cut, merge
from pipeline.recipe import Recipe
from shards.errors import UserError

STRATEGIES = ("ddp", "zero1", "zero2", "fsdp", "zero3")
"""From the one that sends least to the one that keeps least."""
_BUCKET = 500_000_000  # elements: DeepSpeed's reduce_bucket_size by default
_FP32 = 4  # bytes


@dataclass(frozen=True)
class Held:
    """Bytes on a rank between two steps (of the ranks that which holds most), and `passing`: what comes on top of them
    for a moment: buffers of the exchange, gathered layers."""

    weights: int
    gradients: int
    states: int
    averages: int
    passing: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.states + self.averages + self.passing


@dataclass(frozen=True)
class Footprint:
    """Of the model of a recipe. `states`: elements that the optimizer keeps for one of the
    parameters, on average; `largest`: elements of the largest layer."""

    recipe: Recipe
    shapes: tuple[Size, ...]
    largest: int
    states: float

    @property
    def numel(self) -> int:
        return sum(shape.numel() for shape in self.shapes)

    def held(self, strategy: str, ranks: int) -> Held:
        """Under a strategy on so many ranks."""
        pure = self.recipe.runtime.precision == "bf16-pure"
        number, computing = self.numel, 2 if pure else _FP32
        piece = self.piece(strategy, ranks)
        states = math.ceil(self.states * _FP32 * piece)
        if "shampoo" in self.recipe.optimizer.name and strategy == "ddp":
            states = math.ceil(states / ranks)  # its blocks are dealt out
        averages = _FP32 * piece * bool(self.recipe.ema_decay)
        if strategy == "ddp":
            masters = _FP32 * number * pure
            buckets = computing * number * (ranks > 1)
            return Held(computing * number + masters, computing * number + masters, states, averages, buckets)
        gathered = 3 * computing * self.largest  # one layer, the next one, and gradients
        if strategy == "fsdp":
            return Held(_FP32 * piece, _FP32 * piece, states, averages, gathered)
        bucket = _FP32 * min(_BUCKET, number)
        if strategy == "zero3":
            return Held((computing + _FP32) * piece, _FP32 * piece, states, averages, gathered + bucket)
        gradients = _FP32 * (number if strategy == "zero1" else piece)
        return Held(computing * number + _FP32 * piece, gradients, states, averages, bucket)

    def piece(self, strategy: str, ranks: int) -> int:
        """Elements that the rank which has most of them updates."""
        if strategy == "ddp":
            return self.numel
        if strategy in ("zero1", "zero2"):
            return math.ceil(self.numel / ranks)
        if strategy == "zero3":
            return sum(math.ceil(shape.numel() / ranks) for shape in self.shapes)
        ways = ranks // self.recipe.runtime.fsdp_replicas
        return sum(math.ceil(shape[0] / ways) * shape[1:].numel() if shape else 1 for shape in self.shapes)

    def checkpoint(self, strategy: str) -> int:
        """Bytes of one checkpoint, all ranks' files together, to some percent: weights, the optimizer's states and
        averages in fp32; of ZeRO 1 and 2 the weights that the model computes with, too."""
        computing = 2 if self.recipe.runtime.precision == "bf16-pure" else _FP32
        copies = 1 + self.states + bool(self.recipe.ema_decay)
        return math.ceil(self.numel * (_FP32 * copies + computing * (strategy in ("zero1", "zero2"))))

    def weights(self) -> int:
        """Bytes of the files of weights that a finished run leaves, best ones included."""
        return _FP32 * self.numel * (4 if self.recipe.ema_decay else 2)

    def disk(self, strategy: str) -> int:
        """Most bytes that the run needs at one time: a checkpoint is written before an older one goes."""
        return (self.recipe.checkpoint.keep + 1) * self.checkpoint(strategy) + self.weights()


def measure(recipe: Recipe, model: nn.Module) -> Footprint:
    """model: the recipe's, not yet sharded; it may lie on meta."""
    found = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers(model)]
    shapes = [parameter.shape for parameter in model.parameters() if parameter.requires_grad]
    numel = sum(shape.numel() for shape in shapes)
    return Footprint(recipe, tuple(shapes), max(found, default=numel), _states(recipe, model) / numel)


def _states(recipe: Recipe, model: nn.Module) -> float:
    """Elements that the optimizer keeps for all parameters. What is not known is taken to be two for one, as AdamW's
    are."""
    section = recipe.optimizer
    groups = optim.group(model, section.layer_decay)
    given = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if section.name == "muon":
        return sum(parameter.numel() * (1 if name in groups.hidden else 2) for name, parameter in given)
    total = 2 * sum(parameter.numel() for _, parameter in given)
    if section.name == "shampoo":
        total += sum(_factors(parameter.shape, section.shampoo.max_preconditioner_dim) for _, parameter in given)
    return total


def _factors(shape: Sequence[int], largest: int) -> int:
    """Of the factors and of their roots."""
    return sum(2 * side**2 for block in cut(0, merge(shape, largest), largest) for side in block.shape)


def activations(recipe: Recipe, num_classes: int, micro_batch: int) -> int:
    """Bytes that a forward pass of a micro-batch keeps for its backward pass, images included: on all tokens of the
    largest images, of which no stage keeps more. The pass is made with fake tensors of a CPU, so that other devices'
    kernels may keep a little more or less."""
    runtime, kept = recipe.runtime, dict[int, Tensor]()
    dtype = torch.bfloat16 if runtime.precision == "bf16-pure" else torch.float32
    with torch.device("meta"):
        model = make_model(recipe, num_classes).to(dtype)
    prepare_layers(model, "off", runtime.activation_checkpointing)

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    def keep_inputs(layer: nn.Module, inputs: tuple[object, ...]) -> None:
        for tensor in inputs:
            if isinstance(tensor, Tensor):
                keep(tensor)

    cast = runtime.precision in ("bf16", "fp16")
    recomputed = layers(model)[:: runtime.activation_checkpointing] if runtime.activation_checkpointing else []
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16, cast):
        model.to_empty(device="cpu")
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        for layer in recomputed:
            layer.register_forward_pre_hook(keep_inputs)
        side = recipe.augment.image_size
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.empty(micro_batch, 3, side, side, dtype=dtype))
        return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)


def memory_of(device: torch.device, ranks_here: int) -> int:
    """Bytes of memory that a rank can have: the GPU's, or its share of the machine's (of its control group's)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(machine, int(text) if text.isdecimal() else machine) // ranks_here


def check_room(needed: int, free: int, run_dir: Path) -> None:
    """Raises UserError where less is free than a checkpoint needs; both in bytes."""
    if free < needed:
        raise UserError(
            f"a checkpoint takes about {size(needed)}, but the disk of run_dir {run_dir} has only {size(free)} left: "
            "make room there, or give a --run-dir on another disk"
        )


def size(number: float) -> str:
    """Bytes, to read."""
    power = min(4, int(math.log(max(number, 1), 1024)))
    return f"{number / 1024**power:,.{1 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
