"""What runs cost: images, hours, operations, money."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pipeline.recipe.stages import begins
from pipeline.record import WEIGHTS, read_recipe, weights_path
from pipeline.status import Facts, progress_of, seconds_of
from pipeline.status.files import number, read_object
from pipeline.status.progress import global_batch, steps_per_epoch
from pipeline.status.writer import last_attempt
from pipeline.telemetry.flops import FORWARDS_A_STEP, Flops
from shards.errors import UserError

STATE = "state.json"


@dataclass(frozen=True)
class Cost:
    """Of a run so far; None for what is not known. hours: of all processes (a GPU each, where there are some)."""

    images: int | None
    parameters: int | None
    hours: float | None
    world: int | None
    flops: float | None
    price: float | None


def cost_of(facts: Facts, price: float | None) -> Cost:
    """price: of an hour of one process."""
    batch, seconds, world = global_batch(facts), seconds_of(facts), world_of(facts)
    told, step, per_epoch = number(facts.outcome.get("images")), progress_of(facts).step, steps_per_epoch(facts)
    images = int(told) if told is not None else (batch * step if batch else None)
    hours = seconds / 3600 * world if seconds is not None and world else None
    return Cost(
        images,
        _parameters(facts.path),
        hours,
        world,
        _flops(facts.path, images, step / per_epoch if per_epoch else None) if images else None,
        hours * price if hours is not None and price is not None else None,
    )


def total(costs: Sequence[Cost]) -> Cost:
    """The sums of what is known."""

    def summed(name: str) -> Any:
        known = [value for cost in costs if (value := getattr(cost, name)) is not None]
        return sum(known) if known else None

    return Cost(summed("images"), None, summed("hours"), None, summed("flops"), summed("price"))


def world_of(facts: Facts) -> int | None:
    """How many processes the last attempt had, as it noted, a checkpoint or a log tells."""
    writer, _ = last_attempt(facts.logs / "rank-0.log")
    said = [facts.attempts[-1].get("world") if facts.attempts else None]
    said += [checkpoint_state(facts).get("world"), writer.world if writer else None]
    return next((size for size in said if isinstance(size, int) and size > 0), None)


def checkpoint_state(facts: Facts) -> dict[str, Any]:
    return read_object(facts.commit.path / STATE) if facts.commit else {}


def _parameters(run_dir: Path) -> int | None:
    shapes = _shapes(run_dir)
    return sum(map(math.prod, shapes.values())) if shapes else None


def _flops(run_dir: Path, images: int, epoch: float | None) -> float | None:
    """Of all training steps, up to an epoch; None where the model cannot be built, or its number of classes is not
    known, or which stages there were."""
    heads = [shape for name, shape in _shapes(run_dir).items() if name in ("head.weight", "fc.weight")]
    try:
        recipe = read_recipe(run_dir)
        if not heads or (epoch is None and len(begins(recipe)) > 1):
            return None
        return Flops.of(recipe, heads[0][0], 2).mean(0, epoch or 0) * FORWARDS_A_STEP * images
    except (UserError, RuntimeError):
        return None


def _shapes(run_dir: Path) -> dict[str, list[int]]:
    """Of the weights that a run left, by name."""
    for path in (weights_path(run_dir, name) for name in WEIGHTS):
        try:
            with safe_open(path, "np") as file:
                return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError, json.JSONDecodeError):
            continue
    return {}
