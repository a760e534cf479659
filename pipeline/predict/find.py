"""From what a user calls a checkpoint to the Checkpoint."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.augment.exact import EvalTransform
from pipeline.checkpoint import is_checkpoint
from pipeline.models.load import read_weights
from pipeline.predict.checkpoint import Checkpoint, View
from pipeline.predict.runs import Trained, load_run, load_step
from pipeline.predict.timm_weights import CONFIG, PREFIX, WEIGHTS, from_directory, from_file, from_hub
from pipeline.record import CLASSES, RECIPE, read_classes, run_of, weights_path
from shards.errors import UserError


def load_checkpoint(location: str | Path, model: str = "", classes: Sequence[str] | None = None) -> Checkpoint:
    """The checkpoint that `location` names: a finished run's directory or a checkpoint (the averaged weights, where it
    has them), a file of a run's weights/, a directory that tools/export.py wrote, `timm:NAME`, or, with `model` the
    name of one of timm's, a safetensors file of its weights.

    classes: names in order of the labels, in place of those that the checkpoint knows. Nothing that could run code is
    opened. Raises UserError where there is no such checkpoint, and for names that are not as many as its classes.
    """
    return _named(_find(str(location), model), classes)


def load_variants(location: str | Path, model: str = "", classes: Sequence[str] | None = None) -> dict[str, Checkpoint]:
    """Prefix of the figures -> checkpoint: of a run's directory, or a checkpoint, that keeps averages the raw weights
    ("") and the averaged ones ("ema_"), of all else the one that there is, without a prefix. Raises as
    `load_checkpoint`."""
    path = Path(location)
    raw, averaged = (weights_path(path, name) for name in ("model", "ema"))
    if is_checkpoint(path) and not model:
        found = _of_step(path)
    elif raw.is_file() and averaged.is_file() and not model:
        found = {"": _of_run(raw), "ema_": _of_run(averaged)}
    else:
        found = {"": _find(str(location), model)}
    return {prefix: _named(each, classes) for prefix, each in found.items()}


def check_device(device: str) -> None:
    """Raises UserError where "cuda" is asked for and is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: torch sees no CUDA device here (torch.cuda.is_available() is False): run on a GPU machine "
            "with its driver, or give --device cpu"
        )


def _named(found: Checkpoint, classes: Sequence[str] | None) -> Checkpoint:
    if classes is not None:
        found = dataclasses.replace(found, classes=tuple(classes), named="--classes")
    if found.classes is not None and len(found.classes) != found.num_classes:
        raise UserError(
            f"{found.name} has {found.num_classes} classes, but {found.named} names {len(found.classes)}: give the "
            "list that it was trained with as --classes"
        )
    return found


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
    if is_checkpoint(path):
        return [*_of_step(path).values()][-1]
    return _of_run(path)


def _of_file(path: Path) -> Checkpoint:
    if (run_of(path) / RECIPE).is_file():
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
    return _of_trained(run, str(run.weights))


def _of_step(path: Path) -> dict[str, Checkpoint]:
    return {
        prefix: _of_trained(trained, f"{path} ({'averaged' if prefix else 'raw'} weights)")
        for prefix, trained in load_step(path).items()
    }


def _of_trained(run: Trained, name: str) -> Checkpoint:
    classes, view = read_classes(run.weights.absolute().parents[1]), View(EvalTransform.of(run.recipe))
    return Checkpoint(name, run.model, view, classes, f"the run's {CLASSES}", run.recipe)
