"""Finished runs: the model that one trained, ready to be asked."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pipeline.checkpoint import STATE, read_state
from pipeline.checkpoint.weights import read_weights as read_checkpoint
from pipeline.models.build import trained_model
from pipeline.models.load import read_weights
from pipeline.recipe import Recipe
from pipeline.record import read_recipe, recipe_of, run_of, weights_path
from shards.errors import UserError


@dataclass(frozen=True)
class Trained:
    """A model on the CPU, in eval mode, with the recipe and the file of weights, or the checkpoint, that it was made
    of."""

    recipe: Recipe
    model: nn.Module
    weights: Path


def load_run(path: Path) -> Trained:
    """The model of a run directory, with its averaged weights where it has them; or of one file of its weights.

    Nothing that could run code is opened. Raises UserError where the run is not finished, or the files do not fit
    together.
    """
    weights = find_weights(path)
    recipe = read_recipe(run_of(weights))
    return Trained(recipe, trained_model(recipe, read_weights(weights), str(weights)), weights)


def load_step(path: Path) -> dict[str, Trained]:
    """Prefix of the figures -> model of a committed checkpoint of DDP or FSDP2: "" of its weights, and "ema_" of their
    average where one is kept. Nothing that could run code is opened.

    Raises UserError where it is not whole, or of ZeRO.
    """
    weights = read_checkpoint(path)
    recipe = recipe_of(read_state(path)["recipe"], path / STATE, "use the version that wrote it, or a file of weights/")
    found = {"": weights["model"]} | ({"ema_": weights["ema"]} if weights["ema"] else {})
    return {prefix: Trained(recipe, trained_model(recipe, each, str(path)), path) for prefix, each in found.items()}


def find_weights(path: Path) -> Path:
    """The file of weights that `path`, itself one or a run directory, stands for. Raises UserError for none."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file or directory; give a finished run, or its weights/model.safetensors")
    for name in ("ema", "model"):
        if weights_path(path, name).is_file():
            return weights_path(path, name)
    raise UserError(
        f"{path} has no weights/model.safetensors, which a run leaves when it is finished: give a finished run's "
        "directory (of a chain, that of a stage)"
    )
