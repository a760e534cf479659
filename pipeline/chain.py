"""Several stages as one pipeline under one launch: what is finished is skipped, what was interrupted is resumed.

Stages share the process group; each builds a backend of its own. Weights are handed over as a safetensors file.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from pipeline.backend import World
from pipeline.launch import launch
from pipeline.recipe import Recipe, Runtime
from pipeline.record import RECIPE, check_same_recipe, read_outcome, weights_path, write_outcome
from pipeline.trainer import fit
from pipeline.validate import validate
from shards.errors import UserError


@dataclass(frozen=True)
class Stage:
    """A recipe, and the name of the earlier stage whose averaged weights (raw, where it keeps no average) it starts
    from, with new heads; "" starts as the recipe says."""

    name: str
    recipe: Recipe
    start_from: str = ""


def run(stages: Sequence[Stage], run_dir: str, runtime: Runtime) -> NoReturn:
    """The main of a chain's recipe file. The stages' own run directories lie below `run_dir`."""
    dry = any(stage.recipe.dry_run for stage in stages)
    launch(lambda world: fit_all(place(stages, run_dir), world, Path(run_dir)), runtime, Path(run_dir), dry)


def fit_all(stages: Sequence[Stage], world: World, run_dir: Path) -> str:
    """Fits the stages in order; "done", or "requeue" as soon as one is stopped. The chain's own outcome.json counts
    stages as its steps. After a dry run of a stage only those of later ones are left to do."""
    for stage in stages:
        validate(stage.recipe)
    dry = False
    for done, stage in enumerate(stages):
        if dry and not stage.recipe.dry_run:
            _say(world, f"stage {stage.name}: not looked at after a dry run; give --{stage.name}.dry-run")
            continue
        dry = stage.recipe.dry_run
        if world.from_main(is_finished(stage) if world.is_main else None):
            _say(world, f"stage {stage.name}: finished before, skipped")
            continue
        _say(world, f"stage {stage.name}: {stage.recipe.run_dir}")
        outcome = fit(without_start(stage, world) if dry else stage.recipe, world)
        if outcome != "done":
            if not dry:
                _conclude(world, run_dir, outcome, done, f"stage {stage.name} was asked to stop; start again to go on")
            return outcome
    if not dry:
        _conclude(world, run_dir, "done", len(stages), "every stage is finished")
    return "done"


def without_start(stage: Stage, world: World) -> Recipe:
    """For a dry run: the recipe of a stage whose start weights an earlier one has yet to leave, without them."""
    start = stage.recipe.model.start
    if not stage.start_from or world.from_main(Path(start).exists()):
        return stage.recipe
    _say(world, f"stage {stage.name}: looked at without its start weights, which {stage.start_from} will leave")
    return dataclasses.replace(stage.recipe, model=dataclasses.replace(stage.recipe.model, start=""))


def place(stages: Sequence[Stage], run_dir: str) -> list[Stage]:
    """The stages with their run directories below `run_dir`, and start weights out of the earlier stages'.

    Raises UserError where a stage starts from one that does not come before it, or from a file as well.
    """
    placed: dict[str, Stage] = {}
    for stage in stages:
        recipe = dataclasses.replace(stage.recipe, run_dir=str(Path(run_dir) / stage.recipe.run_dir))
        if stage.start_from:
            if recipe.model.start:
                raise UserError(
                    f"stage '{stage.name}' starts from stage '{stage.start_from}', but its model.start names "
                    f"{recipe.model.start}: only one can be; leave model.start empty, or run that recipe on its own"
                )
            if stage.start_from not in placed:
                raise UserError(
                    f"stage '{stage.name}' starts from '{stage.start_from}', but before it come only {list(placed)}: "
                    "name one of those, or put the stage later"
                )
            weights = handed_over(placed[stage.start_from].recipe)
            recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, start=str(weights)))
        placed[stage.name] = dataclasses.replace(stage, recipe=recipe)
    return list(placed.values())


def handed_over(recipe: Recipe) -> Path:
    """The file of weights that a stage leaves to the next."""
    return weights_path(Path(recipe.run_dir), "ema" if recipe.ema_decay else "model")


def is_finished(stage: Stage) -> bool:
    """Whether the stage needs no more work. Raises UserError where it was finished with another recipe."""
    run_dir = Path(stage.recipe.run_dir)
    finished = read_outcome(run_dir).get("outcome") == "done" and handed_over(stage.recipe).exists()
    if finished:
        check_same_recipe(json.loads((run_dir / RECIPE).read_text()), stage.recipe, run_dir)
    return finished


def _conclude(world: World, run_dir: Path, outcome: str, stages_done: int, reason: str) -> None:
    if world.is_main:
        write_outcome(run_dir, outcome, stages_done, reason)


def _say(world: World, message: str) -> None:
    if world.is_main:
        print(message, flush=True)
