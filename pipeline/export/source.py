"""What is exported: a run's weights, and where they come from."""

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pipeline.checkpoint import STATE, is_checkpoint, read_state
from pipeline.checkpoint.weights import read_weights
from pipeline.models.build import trained_model
from pipeline.models.load import read_weights as read_file
from pipeline.recipe import Recipe
from pipeline.record import RECIPE, read_metrics, read_outcome, read_recipe, recipe_of, run_of, weights_path
from shards.errors import UserError

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Source:
    """The whole weights of one model by timm's names, the run that made them, and `variant`, which of its weights
    they are; `state` of the checkpoint that tells of the run, {} for none."""

    path: Path
    run_dir: Path
    recipe: Recipe
    variant: str
    weights: dict[str, Tensor]
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int | None:
        """After how many steps they were taken, where that is known: those of a checkpoint then, the best at their
        evaluation, the others at the end, which may be after the newest checkpoint."""
        if self.variant.startswith("best_") and self.evaluations:
            return self.evaluations[-1]["ema_best_step" if self.variant == "best_ema" else "best_step"]
        outcome = read_outcome(self.run_dir) if self.path.is_file() else {}
        return outcome["step"] if outcome.get("outcome") == "done" else self.state.get("step")

    @functools.cached_property
    def evaluations(self) -> list[dict]:
        """In the run's record, oldest first."""
        return [line for line in read_metrics(self.run_dir) if "split" in line]


def find(path: Path, variant: str = "") -> Source:
    """The weights of a run directory, of a file of its weights/, or of a committed checkpoint of DDP or FSDP2.

    variant: one of WEIGHTS; "" takes the average where there is one. Raises UserError where there are none to export.
    """
    if path.is_file():
        return _of_file(path, variant)
    if (path / RECIPE).is_file():
        return _of_run(path, variant)
    if is_checkpoint(path):
        return _of_checkpoint(path, variant)
    raise UserError(
        f"{path} is no run directory (it has no {RECIPE}), no checkpoint and no file: give one of these, of a chain "
        "the directory of a stage"
    )


def build(source: Source) -> nn.Module:
    """The model in evaluation mode on the CPU. Raises UserError where the weights do not fit the recipe."""
    return trained_model(source.recipe, source.weights, str(source.path))


def newest_state(run_dir: Path) -> dict[str, Any]:
    """What the newest checkpoint says of its run; {} for none."""
    states = sorted((run_dir / "checkpoints").glob("step-*[0-9]/state.json"))
    return json.loads(states[-1].read_text()) if states else {}


def _of_file(path: Path, variant: str) -> Source:
    run_dir = run_of(path)
    if variant and variant != path.stem:
        raise UserError(
            f"{path} are the weights '{path.stem}', and no '{variant}': give the run's directory, or no --weights"
        )
    return Source(path, run_dir, read_recipe(run_dir), path.stem, read_file(path), newest_state(run_dir))


def _of_run(run_dir: Path, variant: str) -> Source:
    recipe = read_recipe(run_dir)
    variant = variant or ("ema" if recipe.ema_decay else "model")
    path = weights_path(run_dir, variant)
    if not path.is_file():
        there = sorted(file.stem for file in path.parent.glob("*.safetensors"))
        raise UserError(
            f"{run_dir} has no weights '{variant}', only {there}: a run writes model and ema when it is finished; "
            "give --weights one of these, or one of its checkpoints/step-*"
        )
    return Source(path, run_dir, recipe, variant, read_file(path), newest_state(run_dir))


def _of_checkpoint(path: Path, variant: str) -> Source:
    found = read_weights(path)
    variant = variant or ("ema" if found["ema"] else "model")
    if variant not in found or not found[variant]:
        there = " or ".join(name for name in found if found[name])
        raise UserError(f"{path} has no weights '{variant}': give --weights {there}, or the run's directory")
    state = read_state(path)
    recipe = recipe_of(state["recipe"], path / STATE, "export by the version that wrote it, or a file of weights/")
    return Source(path, run_of(path), recipe, variant, found[variant], state)
