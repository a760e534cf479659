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
    """Seconds for one step's images and for one step, on the slowest rank; `peak`: most bytes of tensors on a GPU (0
    without one)."""

    load_seconds: float
    step_seconds: float
    peak: int


def measure(run: Run) -> Trial:
    """Loads batches and makes steps with them, as the run would next. The weights are others afterwards: there is no
    way back to training. Every rank calls it."""
    start, world, cuda = run.progress.start, run.world, run.world.device.type == "cuda"
    waiting = -(-_AHEAD * run.recipe.data.workers // run.recipe.data.accumulation)  # in work when the first one comes
    with run.input.stream.open(start, start + 1 + waiting + MOST) as batches:
        for _ in range(1 + waiting):
            last = next(batches)
        load_seconds, last = _load(batches, last)
        step_seconds = _steps(run, last)
    everyone = world.gather((load_seconds, step_seconds, torch.cuda.max_memory_allocated() if cuda else 0))
    load, step, peak = zip(*everyone, strict=True)
    return Trial(max(load), max(step), max(peak))


def _load(batches: Iterator[list[Batch]], last: list[Batch]) -> tuple[float, list[Batch]]:
    """Seconds for the batches of one step, and the last of them."""
    began, number = time.perf_counter(), 0
    while number < FEWEST or (number < MOST and time.perf_counter() - began < PATIENCE):
        last, number = next(batches), number + 1
    return (time.perf_counter() - began) / number, last


def _steps(run: Run, batches: list[Batch]) -> float:
    """Seconds of one, augmentation on the device included."""
    learner, wait = run.learner, _waiting(run)
    began = 0.0
    for number in range(STEPS):
        if number == 1:
            wait()
            began = time.perf_counter()
        learner.backend.set_lr(learner.schedule(run.progress.start))
        learner.backend.step(learner.criterion, [run.input.augment(batch) for batch in batches])
        if learner.ema:
            learner.ema.update()
    wait()
    return (time.perf_counter() - began) / (STEPS - 1)


def _waiting(run: Run) -> Callable[[], None]:
    return torch.cuda.synchronize if run.world.device.type == "cuda" else lambda: None
