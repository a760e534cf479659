"""The two sides of tools/bench_step.py: the run of a recipe, fed the same batch again and again, and a bare loop."""

import contextlib
import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.augment.device import normalise, one_hot
from pipeline.backend import World
from pipeline.backend.layers import prepare_layers
from pipeline.data.batch import Batch
from pipeline.data.stream import TrainStream
from pipeline.loss import SummedOverHeads
from pipeline.models.build import make_model
from pipeline.prepare import prepare
from pipeline.recipe import (
    Augment,
    Checkpoint,
    Data,
    Evaluation,
    Model,
    Recipe,
    Runtime,
    Schedule,
    TokenExpansion,
)
from pipeline.trainer import train
from tools.benchmarks import NUM_CLASSES

EMA_DECAY = 0.999
LOG_EVERY = "10 steps"


@dataclass(frozen=True)
class Settings:
    """What both sides train alike; but for `keep_rate`, of our side's tokens (ToE, from a quarter in two rounds)."""

    model: str
    image_size: int
    batch: int
    precision: str
    compiler: str
    device: str
    averaged: bool
    keep_rate: float = 1.0

    def recipe(self, data: Path, run_dir: Path, steps: int) -> Recipe:
        """Evaluated and saved at its end alone."""
        expansion = TokenExpansion((0,), (self.keep_rate,), initial_keep_rate=0.25, repetitions=2)
        return Recipe(
            run_dir=str(run_dir),
            ema_decay=EMA_DECAY if self.averaged else 0,
            data=Data(path=str(data), global_batch=self.batch, workers=0),
            augment=Augment(image_size=self.image_size),
            model=Model(name=self.model),
            token_expansion=expansion if self.keep_rate < 1 else TokenExpansion(),
            schedule=Schedule(length=f"{steps} steps", warmup="0 steps"),
            evaluation=Evaluation(every="100%", batch=1),
            checkpoint=Checkpoint(every="100%"),
            runtime=Runtime(precision=self.precision, compile=self.compiler, log_every=LOG_EVERY),  # type: ignore[arg-type]
        )


@dataclass(frozen=True)
class Fed(TrainStream):
    """A stream in whose place `feed` gives the batches, and so gets the word between two steps of the run."""

    feed: Callable[[], Iterator[Batch]] = iter(()).__iter__

    @contextmanager
    def open(self, start: int, stop: int) -> Iterator[Iterator[list[Batch]]]:
        yield ([batch] for batch in self.feed())


def train_fed(recipe: Recipe, world: World, feed: Callable[[], Iterator[Batch]]) -> None:
    """The recipe's own loop, to its end, with what it prints left out."""
    with contextlib.redirect_stdout(io.StringIO()):
        run = prepare(recipe, world)
        stream = Fed(**vars(run.input.stream), feed=feed)
        train(replace(run, input=replace(run.input, stream=stream)))
        run.learner.backend.close()


class Bare:
    """The same model, arithmetic, AdamW, clipping and average in as few lines of PyTorch as it takes."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.model = make_model(recipe, NUM_CLASSES).to(device)
        prepare_layers(self.model, recipe.runtime.compile, 0)
        section = recipe.optimizer
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=recipe.schedule.lr,
            betas=section.betas,
            eps=section.eps,
            weight_decay=section.weight_decay,
            fused=device.type == "cuda",
        )
        self.averages = self._average(recipe.ema_decay)
        self.criterion, self.clip_norm = SummedOverHeads(recipe.loss), section.clip_norm
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=recipe.runtime.precision == "bf16")

    def step(self, batch: Batch) -> None:
        images, targets = normalise(batch.images), one_hot(batch.labels, NUM_CLASSES)
        with self.autocast:
            outputs = self.model(images)
        self.criterion(outputs, targets).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.averages:
            self.averages.update_parameters(self.model)

    def _average(self, decay: float) -> AveragedModel | None:
        return AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None


@dataclass
class Turns:
    """Seconds of a step of ours and of theirs, which take turns of `steps` steps; the first turn does not count."""

    batch: Batch
    number: int
    steps: int
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Steps of our run: the last one, after which it evaluates and saves, is in no turn."""
        return (self.number + 1) * self.steps + 1

    def feed(self, their_step: Callable[[Batch], None]) -> Iterator[Batch]:
        """Batches for our run. Whenever it asks for the next one, all of a step is behind it, bookkeeping included."""
        for turn in range(self.number + 1):
            began = time.perf_counter()
            for _ in range(self.steps):
                yield self.batch
            self._note(self.ours, began, turn)
            began = time.perf_counter()
            for _ in range(self.steps):
                their_step(self.batch)
            self._note(self.theirs, began, turn)
        yield self.batch

    def _note(self, seconds: list[float], began: float, turn: int) -> None:
        if self.batch.images.is_cuda:
            torch.cuda.synchronize()
        if turn:
            seconds.append((time.perf_counter() - began) / self.steps)


def make_batch(settings: Settings, device: torch.device) -> Batch:
    generator, size = torch.Generator().manual_seed(0), settings.image_size
    images = torch.randint(0, 256, (settings.batch, 3, size, size), dtype=torch.uint8, generator=generator)
    ids = torch.arange(settings.batch)
    return Batch(images, ids % NUM_CLASSES, ids, first=0, step=0, epoch=0).to(device)


def reset_peak(device: torch.device) -> int:
    """Bytes in use now, beside which a peak is measured: of the device, or on the CPU of this process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
