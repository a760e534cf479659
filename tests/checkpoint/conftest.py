"""A tiny backend in a process group of one, and the checkpoints of its run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipeline.backend import Backend, StepOptions, wrap
from pipeline.backend.world import World
from pipeline.checkpoint import Checkpoints
from pipeline.optim import adamw
from pipeline.sharded import Shard


@pytest.fixture(scope="package", autouse=True)
def _group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def make_backend() -> Callable[..., Backend]:
    """make_backend(strategy, **StepOptions) -> a linear layer and AdamW."""

    def make(strategy: str, **options: object) -> Backend:
        torch.manual_seed(0)
        world = World(strategy, 0, 1, torch.device("cpu"))
        found = wrap(world, nn.Linear(3, 2), lambda m: adamw(m, (0.9, 0.999), 1e-8, 0.0), StepOptions(4, **options))
        found.set_lr(0.1)
        return found

    return make


@pytest.fixture
def backend(make_backend) -> Backend:
    return make_backend("ddp")


@pytest.fixture(params=[False, True], ids=["at once", "behind"])
def checkpoints(alone, tmp_path, request) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", alone, keep=2, asynchronous=request.param)


@pytest.fixture
def train() -> Callable[[Backend, int], None]:
    """train(backend, seed): one step on images that the seed decides."""

    def step(backend: Backend, seed: int) -> None:
        images = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        backend.step(lambda outputs, targets: (outputs - targets).square().mean(), [(images, torch.zeros(4, 2))])

    return step


@pytest.fixture
def save() -> Callable[[Checkpoints, Backend, int], Path]:
    """save(checkpoints, backend, step) -> the directory that is committed when it returns."""

    def commit(checkpoints: Checkpoints, backend: Backend, step: int) -> Path:
        averages = [Shard("w", torch.full((2,), float(step)), 0, 2)]
        path = checkpoints.save(step, backend, {"ema": averages}, {"kept": "yes"})
        checkpoints.wait()
        return path

    return commit
