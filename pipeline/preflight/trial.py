"""How fast images come, and how fast steps take them: measured apart, on this launch."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch

from pipeline.data.batch import Batch
from pipeline.recipe import stages
from pipeline.run import Run

STEPS = 4
"""Steps that are made, of which the first is not timed."""
FEWEST, MOST, PATIENCE = 3, 20, 10.0
"""How many steps' batches are timed: as many as come in so many seconds, within these bounds."""
_AHEAD = 2  # batches that a worker has in work


class Stage(NamedTuple):
    """So many steps of equal work that are left, on images of one size; seconds for the images of a step and for the
    step itself, each on the slowest rank."""

    number: int
    image_size: int
    load_seconds: float
    step_seconds: float


@dataclass(frozen=True)
class Trial:
    """What is left, of a recipe without stages as one; `peak`: most bytes of tensors on a GPU (0 without one)."""

    stages: tuple[Stage, ...]
    peak: int

    @property
    def load_seconds(self) -> float:
        """For the images of a step, the mean of all that are left."""
        return self._mean([stage.load_seconds for stage in self.stages])

    @property
    def step_seconds(self) -> float:
        """The mean of all steps that are left."""
        return self._mean([stage.step_seconds for stage in self.stages])

    @property
    def seconds(self) -> float:
        """Of all steps that are left."""
        return sum(stage.number * max(stage.load_seconds, stage.step_seconds) for stage in self.stages)

    def _mean(self, seconds: list[float]) -> float:
        left = sum(stage.number for stage in self.stages)
        weighted = sum(stage.number * each for stage, each in zip(self.stages, seconds, strict=True))
        return weighted / left if left else seconds[0]


def measure(run: Run) -> Trial:
    """Loads batches and makes steps with them, as the run would at each of its stages. The weights are others
    afterwards: there is no way back to training. Every rank calls it."""
    stream, world, cuda = run.input.stream, run.world, run.world.device.type == "cuda"
    per_epoch = stream.plan.batches_per_epoch
    parts = stages.parts(run.recipe, per_epoch, run.progress.start, run.durations.total)
    found: list[Stage] = []
    for side, group in groupby(parts, lambda part: stream.samples.image_size_at(part[0] // per_epoch)):
        alike = list(group)
        load_seconds, batches = _load(run, alike[0][0])
        found += [Stage(number, side, load_seconds, _steps(run, batches, first)) for first, number in alike]
    everyone = world.gather((found, torch.cuda.max_memory_allocated() if cuda else 0))
    stages_of, peaks = zip(*everyone, strict=True)
    return Trial(tuple(map(_slowest, zip(*stages_of, strict=True))), max(peaks))


def _slowest(ranks: Sequence[Stage]) -> Stage:
    loads, steps = [stage.load_seconds for stage in ranks], [stage.step_seconds for stage in ranks]
    return Stage(ranks[0].number, ranks[0].image_size, max(loads), max(steps))


def _load(run: Run, first: int) -> tuple[float, list[Batch]]:
    """Seconds for the batches of a step, from step `first` on, and the first of them, whose pixels are others' now: of
    this size, where the others may be of the next stage."""
    data = run.recipe.data
    waiting = -(-_AHEAD * data.workers // data.accumulation)  # in work when the first one comes
    with run.input.stream.open(first, first + 1 + waiting + MOST) as batches:
        kept = next(batches)
        for _ in range(waiting):
            next(batches)
        began, number = time.perf_counter(), 0
        while number < FEWEST or (number < MOST and time.perf_counter() - began < PATIENCE):
            next(batches)
            number += 1
        return (time.perf_counter() - began) / number, kept


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
