"""From what a user calls a checkpoint to the Checkpoint."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.augment.exact import EvalTransform
from pipeline.models.load import read_weights
from pipeline.predict.checkpoint import Checkpoint, View
from pipeline.predict.runs import load_run
from pipeline.predict.timm_weights import CONFIG, PREFIX, WEIGHTS, from_directory, from_file, from_hub
from pipeline.record import CLASSES, RECIPE, read_classes, weights_path
from shards.errors import UserError


def load_checkpoint(location: str | Path, model: str = "", classes: Sequence[str] | None = None) -> Checkpoint:
    """The checkpoint that `location` names: a finished run's directory (its averaged weights, where it has them), a
    file of its weights/, a directory that tools/export.py wrote, `timm:NAME`, or, with `model` the name of one of
    timm's, a safetensors file of its weights.

    classes: names in order of the labels, in place of those that the checkpoint knows. Nothing that could run code is
    opened. Raises UserError where there is no such checkpoint, and for names that are not as many as its classes.
    """
    found = _find(str(location), model)
    if classes is not None:
        found = dataclasses.replace(found, classes=tuple(classes), named="--classes")
    if found.classes is not None and len(found.classes) != found.num_classes:
        raise UserError(
            f"{found.name} has {found.num_classes} classes, but {found.named} names {len(found.classes)}: give the "
            "list that it was trained with as --classes"
        )
    return found


def load_variants(location: str | Path, model: str = "", classes: Sequence[str] | None = None) -> dict[str, Checkpoint]:
    """Prefix of the figures -> checkpoint: of a run's directory that keeps averages the raw weights ("") and the
    averaged ones ("ema_"), of all else the one that there is, without a prefix. Raises as `load_checkpoint`."""
    raw, averaged = (weights_path(Path(location), name) for name in ("model", "ema"))
    if raw.is_file() and averaged.is_file() and not model:
        return {"": load_checkpoint(raw, "", classes), "ema_": load_checkpoint(averaged, "", classes)}
    return {"": load_checkpoint(location, model, classes)}


def check_device(device: str) -> None:
    """Raises UserError where "cuda" is asked for and is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: torch sees no CUDA device here (torch.cuda.is_available() is False): run on a GPU machine "
            "with its driver, or give --device cpu"
        )


def _find(location: str, model: str) -> Checkpoint:
    path = Path(location)
    if model and not path.is_file():
        raise UserError(f"--model {model}: {location} is no file; the option is for a file of weights of timm's model")
    if model:
        return from_file(path, model)
    if location.startswith(PREFIX):
        return from_hub(location.removeprefix(PREFIX))
    if path.is_file():
        return _of_file(path)
    if (path / CONFIG).is_file():
        return from_directory(path)
    if path.is_dir() and path.name.startswith("step-"):
        raise UserError(
            f"{path} is a checkpoint to continue a run from: write its weights by tools/export.py {path} OUT, and give "
            "OUT"
        )
    return _of_run(path)


def _of_file(path: Path) -> Checkpoint:
    if (path.absolute().parents[1] / RECIPE).is_file():
        return _of_run(path)
    if path.name == WEIGHTS and (path.parent / CONFIG).is_file():
        return from_directory(path.parent)
    read_weights(path)  # what is no file of weights at all is refused as that
    raise UserError(
        f"{path} does not say which model it is of: it lies in no run ({RECIPE} above it) and in no exported directory "
        f"({CONFIG} beside it); give the name of timm's model as --model"
    )


def _of_run(path: Path) -> Checkpoint:
    run = load_run(path)
    classes, view = read_classes(run.weights.absolute().parents[1]), View(EvalTransform.of(run.recipe))
    return Checkpoint(str(run.weights), run.model, view, classes, f"the run's {CLASSES}", run.recipe)
