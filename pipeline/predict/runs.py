"""Finished runs: the model that one trained, ready to be asked."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pipeline.models.build import make_model
from pipeline.models.load import load_start, num_stored_classes
from pipeline.recipe import Recipe
from pipeline.record import read_recipe, weights_path
from shards.errors import UserError


@dataclass(frozen=True)
class Trained:
    """A model on the CPU, in eval mode, with the recipe and the file of weights that it was made of."""

    recipe: Recipe
    model: nn.Module
    weights: Path


def load_run(path: Path) -> Trained:
    """The model of a run directory, with its averaged weights where it has them; or of one file of its weights.

    Nothing that could run code is opened. Raises UserError where the run is not finished, or the files do not fit
    together.
    """
    weights = find_weights(path)
    recipe = read_recipe(weights.absolute().parents[1])
    model = make_model(recipe, num_classes=1)
    model.reset_classifier(num_stored_classes(model, weights))  # type: ignore[operator] # every model of timm has it
    load_start(model, weights, new_heads=False)
    return Trained(recipe, model.eval(), weights)


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
