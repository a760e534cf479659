"""How fast images come, and how fast steps take them: measured apart, on this launch."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from pipeline.data.batch import Batch
from pipeline.run import Run

STEPS = 4
"""Steps that are made, of which the first is not timed."""
FEWEST, MOST, PATIENCE = 3, 20, 10.0
"""How many steps' batches are timed: as many as come in so many seconds, within these bounds."""
_AHEAD = 2  # batches that a worker has in work


@dataclass(frozen=True)
class Trial:
    """Seconds for one step's images, on the slowest rank; of each stage of token expansion that is left (one without)
    the number of steps and the seconds for one, likewise; `peak`: most bytes of tensors on a GPU (0 without one)."""

    load_seconds: float
    stages: tuple[tuple[int, float], ...]
    peak: int

    @property
    def step_seconds(self) -> float:
        """The mean of all steps that are left."""
        left = sum(number for number, _ in self.stages)
        return sum(number * seconds for number, seconds in self.stages) / left if left else self.stages[0][1]

    @property
    def seconds(self) -> float:
        """Of all steps that are left."""
        return sum(number * max(self.load_seconds, seconds) for number, seconds in self.stages)


def measure(run: Run) -> Trial:
    """Loads batches and makes steps with them, as the run would next. The weights are others afterwards: there is no
    way back to training. Every rank calls it."""
    start, world, cuda = run.progress.start, run.world, run.world.device.type == "cuda"
    waiting = -(-_AHEAD * run.recipe.data.workers // run.recipe.data.accumulation)  # in work when the first one comes
    with run.input.stream.open(start, start + 1 + waiting + MOST) as batches:
        for _ in range(1 + waiting):
            last = next(batches)
        load_seconds, last = _load(batches, last)
        parts = run.learner.tokens.parts(start, run.durations.total)
        step_seconds = [_steps(run, last, first) for first, _ in parts]
    everyone = world.gather((load_seconds, step_seconds, torch.cuda.max_memory_allocated() if cuda else 0))
    load, steps, peak = zip(*everyone, strict=True)
    slowest = map(max, zip(*steps, strict=True))
    stages = tuple((number, seconds) for (_, number), seconds in zip(parts, slowest, strict=True))
    return Trial(max(load), stages, max(peak))


def _load(batches: Iterator[list[Batch]], last: list[Batch]) -> tuple[float, list[Batch]]:
    """Seconds for the batches of one step, and the last of them."""
    began, number = time.perf_counter(), 0
    while number < FEWEST or (number < MOST and time.perf_counter() - began < PATIENCE):
        last, number = next(batches), number + 1
    return (time.perf_counter() - began) / number, last


def _steps(run: Run, batches: list[Batch], first: int) -> float:
    """Seconds of one like step `first`, augmentation on the device included."""
    learner, wait = run.learner, _waiting(run)
    began = 0.0
    learner.tokens(first)
    for number in range(STEPS):
        if number == 1:
            wait()
            began = time.perf_counter()
        learner.backend.set_lr(learner.schedule(first))
        learner.backend.step(learner.criterion, [run.input.augment(batch) for batch in batches])
        if learner.ema:
            learner.ema.update()
    wait()
    return (time.perf_counter() - began) / (STEPS - 1)


def _waiting(run: Run) -> Callable[[], None]:
    return torch.cuda.synchronize if run.world.device.type == "cuda" else lambda: None
