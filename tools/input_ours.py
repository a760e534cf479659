"""Our loader, as benchmarks/peers/loaders.py runs it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.augment.exact import TrainTransform
from pipeline.augment.fast import FastTrainTransform
from pipeline.augment.policies import TorchvisionPolicy
from pipeline.backend.world import World
from pipeline.data.loading import Loading, serve_workers
from pipeline.data.samples import Samples, Transform
from pipeline.data.stream import TrainStream
from shards.index import Index
from shards.layout import Layout
from shards.plan import Plan
from shards.reader import Reader

BATCH, WORKERS, SIDE = 64, 2, 224
ENDLESS = 1 << 40  # steps


def exact(folder: Path, randaugment: bool) -> Iterator[Tensor]:
    return _stream(folder, TrainTransform(SIDE, **_operations(randaugment)))


def fast(folder: Path, randaugment: bool) -> Iterator[Tensor]:
    return _stream(folder, FastTrainTransform(SIDE, **_operations(randaugment)))


def _operations(randaugment: bool) -> dict[str, Any]:
    return {"randaugment": TorchvisionPolicy(2, 15)} if randaugment else {}


def _stream(folder: Path, transform: Transform) -> Iterator[Tensor]:
    """Images of one global batch after another, as a trainer on one rank gets them."""
    serve_workers()
    index = Index.load(folder)
    samples = Samples(Reader(index, "train"), transform, seed=0, substitutes=True)
    plan = Plan(len(samples.reader), index.fingerprint("train"), 0, BATCH)
    world = World("ddp", 0, 1, torch.device("cpu"))
    layout, loading = Layout(BATCH, world.size), Loading(WORKERS, world.device)
    with TrainStream(samples, plan, world, layout, loading).open(0, ENDLESS) as steps:
        for micro_batches in steps:
            for batch in micro_batches:
                yield batch.images
