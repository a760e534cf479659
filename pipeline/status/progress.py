"""How far a run is, how fast, and how good."""

import time
from dataclasses import dataclass
from typing import Any

from pipeline.record import METRICS
from pipeline.status.facts import Facts
from pipeline.status.files import modified, number
from pipeline.validate import num_steps
from shards.errors import UserError


@dataclass(frozen=True)
class Progress:
    """Optimizer steps that are logged, of how many; None where that is not known. `seconds_left`: at the pace of this
    attempt, evaluations and checkpoints included."""

    step: int
    total: int | None
    epoch: float | None
    images_per_second: float | None
    data_wait: float | None
    seconds_left: float | None


@dataclass(frozen=True)
class Best:
    step: int
    metric: str
    value: float


def progress_of(facts: Facts, now: float | None = None) -> Progress:
    last: dict[str, Any] = facts.steps[-1] if facts.steps else {}
    said = (facts.outcome.get("step"), last.get("step"), facts.commit and facts.commit.step)
    step = max((number for number in said if isinstance(number, int)), default=0)
    total = step if facts.outcome.get("outcome") == "done" else _total(facts)
    rate, wait = number(last.get("images_per_second")), number(last.get("data_wait"))
    left = _seconds_left(facts, total, now or time.time()) if total else None
    return Progress(step, total, number(last.get("epoch")), rate, wait, left)


def steps_per_epoch(facts: Facts) -> int | None:
    """As the logged steps tell it."""
    for line in reversed(facts.steps):
        epoch = number(line.get("epoch"))
        if epoch and (steps := number(line["step"] / epoch)) is not None:
            return round(steps) or None
    return None


def global_batch(facts: Facts) -> int | None:
    batch = facts.recipe.get("data.global_batch")
    return batch if isinstance(batch, int) and batch > 0 else None


def seconds_of(facts: Facts, now: float | None = None) -> float | None:
    """Time spent on the run: as its outcome tells it, else since its first start until it last wrote (until now,
    where `now` is given); None before it is started."""
    if (told := number(facts.outcome.get("seconds"))) is not None:
        return told
    started = [begun for line in facts.attempts if (begun := number(line.get("started"))) is not None]
    return max(0.0, (now or facts.modified) - started[0]) if started else None


def best_evaluation(facts: Facts) -> Best | None:
    """The highest top-1 of the memory head (of the only one, where there is none), raw or averaged."""
    found = []
    for line in facts.evaluations:
        head = "memory" if "memory_top1" in line else "head"
        scores = {name: number(line.get(name)) for name in (f"{head}_top1", f"ema_{head}_top1")}
        found += [Best(line["step"], name, value) for name, value in scores.items() if value is not None]
    return max(found, key=lambda best: best.value, default=None)


def _total(facts: Facts) -> int | None:
    length, per_epoch, batch = facts.recipe.get("schedule.length"), steps_per_epoch(facts), global_batch(facts)
    if not isinstance(length, str) or not batch or (per_epoch is None and "epoch" in length):
        return None
    try:
        return num_steps(length, per_epoch or 0, batch)
    except UserError:
        return None


def _seconds_left(facts: Facts, total: int, now: float) -> float | None:
    """Counted from the last logged step."""
    if not facts.steps or not facts.attempts:
        return None
    step, attempt, logged = facts.steps[-1]["step"], facts.attempts[-1], modified(facts.path / METRICS)
    started, begun = number(attempt.get("started")), number(attempt.get("step"))
    if started is None or begun is None or step <= begun:
        return None
    return number(max(0.0, (logged - started) / (step - begun) * (total - step) - (now - logged)))
