"""Compilation and activation checkpointing of layers, and arithmetic, in one process."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from pipeline.backend import Backend, StepOptions, wrap
from pipeline.backend.base import Mixed
from pipeline.optim import adamw
from shards.errors import UserError

WIDTH, DEPTH = 8, 9


class Layer(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x)) / len(self.name)


class Model(nn.Module):
    """Every layer has a constant of its own, so that dynamo makes a graph of each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer("x" * index) for index in range(1, DEPTH + 1))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def square(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.float() - targets).square().mean()


def made(alone, **options: object) -> Backend:
    options = {"global_batch": 16 * options.get("accumulation", 1)} | options
    backend = wrap(alone, Model(), lambda m: adamw(m, (0.9, 0.999), 1e-8, 0.0), StepOptions(**options))
    backend.set_lr(0.01)
    return backend


def batches(count: int = 2) -> list[Mixed]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, WIDTH, generator=generator), torch.ones(16, 3)) for _ in range(count)]


def train(backend: Backend, given: Sequence[Mixed], steps: int = 3) -> list[float]:
    found = [backend.step(square, given) for _ in range(steps)]
    assert all(stepped.applied for stepped in found)
    return [value.item() for stepped in found for value in (stepped.loss, stepped.grad_norm)]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
def test_compiled_layers_compute_the_same(alone):
    """Nine different graphs, where dynamo by itself compiles eight of a function and runs the rest as it is. Closing
    forgets what was compiled: the next stage of a chain compiles its own."""
    plain = made(alone, accumulation=2)
    expected = train(plain, batches())
    plain.close()
    for every in (0, 1):
        counters.clear()
        compiled = made(alone, accumulation=2, compiler="aot_eager", recompute_every=every)
        assert train(compiled, batches()) == expected
        compiled.close()
        assert counters["frames"]["ok"] >= DEPTH
        assert not counters["graph_break"]
    assert list(compiled.full_weights()) == list(plain.full_weights())


def kept_by_forward(backend: Backend) -> int:
    """Bytes of the activations that the backward pass will find."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        backend.forward_loss(square, batches(1)[0])
    return sum(kept.values())


def test_recomputed_layers_keep_less_and_compute_the_same(alone):
    kept, found = [], []
    for every in (0, 2, 1):
        backend = made(alone, recompute_every=every)
        kept.append(kept_by_forward(backend))
        found.append(train(backend, batches(1)))
        backend.close()
    assert kept[0] > kept[1] > kept[2]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("precision", ["bf16", "bf16-pure", "fp16"])
def test_low_precision_is_near_fp32_and_updates_fp32(alone, precision):
    expected, found = (train(made(alone, precision=name), batches(1), steps=20) for name in ("fp32", precision))
    assert found == pytest.approx(expected, rel=0.05)
    assert found != pytest.approx(expected, rel=1e-5)
    backend = made(alone, precision=precision)
    assert {shard.tensor.dtype for shard in backend.shards()} == {torch.float32}
    assert {tensor.dtype for tensor in backend.full_weights().values()} == {torch.float32}


def test_small_steps_are_not_lost_in_pure_bf16(alone):
    """Fifty steps of a millionth each: bf16 has 256 numbers between 0.5 and 1."""
    backend = made(alone, precision="bf16-pure")
    backend.set_lr(1e-6)
    before = backend.full_weights()["head.weight"].clone()
    train(backend, batches(1), steps=50)
    moved = (backend.full_weights()["head.weight"] - before).abs()
    assert moved.min() > 2e-5
    assert torch.equal(backend.module.head.weight, backend.full_weights()["head.weight"].bfloat16())


def test_a_step_whose_gradients_overflow_is_computed_again_at_a_smaller_scale(alone):
    backend, steeper = made(alone, precision="fp16"), lambda outputs, targets: 1000 * square(outputs, targets)
    before = backend.scaler.get_scale()
    stepped = backend.step(steeper, batches(1))
    assert stepped.applied
    assert backend.scaler.get_scale() < before
    exact = made(alone).step(steeper, batches(1))
    assert stepped.grad_norm.item() == pytest.approx(exact.grad_norm.item(), rel=0.01)


def test_fp16_is_refused_elsewhere(alone):
    for strategy in ("fsdp", "deepspeed"):
        with pytest.raises(UserError, match=rf"fp16 is for DDP alone, but the launch file asks for {strategy}: give"):
            made(dataclasses.replace(alone, strategy=strategy), precision="fp16")
