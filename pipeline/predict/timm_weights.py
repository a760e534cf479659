"""Weights of timm's models: by name from the hub, a file, or a directory in the hub's layout. Safetensors alone."""

import difflib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
from huggingface_hub import hf_hub_download
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

import pipeline.models  # noqa: F401 - adds ours to timm's registry
from pipeline.models.load import load_weights, num_stored_classes, read_weights
from pipeline.predict.checkpoint import Checkpoint, view_of_timm
from shards.errors import UserError

WEIGHTS, CONFIG = "model.safetensors", "config.json"
PREFIX = "timm:"
_AS_FILE = "give the path of a safetensors file of its weights, and --model"


def from_hub(name: str) -> Checkpoint:
    """timm's pretrained weights of a model of its registry, downloaded or out of the hub's cache.

    Raises UserError where there is no such model, where its weights are not safetensors, or where they cannot be had.
    """
    _check_known(name, f"{PREFIX}{name}")
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # an unknown tag
        raise UserError(f"{PREFIX}{name}: {error} timm has {timm.list_pretrained(name.split('.')[0] + '*')}") from error
    if config is None or not config.hf_hub_id or config.hf_hub_filename:
        raise UserError(f"{PREFIX}{name}: timm has no {WEIGHTS} of it, and other formats are not opened; {_AS_FILE}")
    try:
        path = hf_hub_download(config.hf_hub_id, WEIGHTS, library_name="vittm-pipeline")
    except OSError as error:  # huggingface_hub's own are all of them
        raise UserError(
            f"{PREFIX}{name}: {WEIGHTS} of {config.hf_hub_id} cannot be downloaded here ({error}): {_AS_FILE}"
        ) from error
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": path, "custom_load": False})
    return _checkpoint(f"{PREFIX}{name}", model)


def from_file(path: Path, name: str) -> Checkpoint:
    """The model `name` of timm's registry with the weights of a file, which decides how many classes it has.

    Raises UserError where there is no such model, and for the weights of another one.
    """
    _check_known(name, f"--model {name}")
    return _checkpoint(str(path), _filled(partial(timm.create_model, name), path))


def from_directory(directory: Path) -> Checkpoint:
    """A directory in the hub's layout, as tools/export.py writes it. Raises UserError where it is not whole."""
    path = directory / WEIGHTS
    if not path.is_file():
        raise UserError(
            f"{directory} has no {WEIGHTS}; other files of weights may run code when opened, so none is read: write "
            "the weights anew with safetensors.torch.save_file, or the directory with tools/export.py"
        )
    try:
        model = _filled(partial(timm.create_model, f"local-dir:{directory}"), path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{directory / CONFIG} builds no model ({type(error).__name__}: {error}): write the directory anew with "
            "tools/export.py"
        ) from error
    return _checkpoint(str(directory), model)


def _check_known(name: str, option: str) -> None:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        raise UserError(f"{option}: there is no such model in timm's registry; the nearest names there are {near}")


def _filled(make: Callable[..., nn.Module], path: Path) -> nn.Module:
    model, weights = make(), read_weights(path)
    if model.num_classes:
        stored = num_stored_classes(model, weights, str(path))
        if stored != model.num_classes:
            model = make(num_classes=stored)
    load_weights(model, weights, str(path), new_heads=False)
    return model


def _checkpoint(name: str, model: nn.Module) -> Checkpoint:
    classes, named = _classes(model)
    return Checkpoint(name, model.eval(), view_of_timm(model, name), classes, named)


def _classes(model: nn.Module) -> tuple[tuple[str, ...] | None, str]:
    """The names that the model's configuration gives, or that timm takes for a model of so many classes; and who says
    so."""
    names = model.pretrained_cfg.get("label_names")  # type: ignore[operator,union-attr] # a dict, on every model of timm
    if isinstance(names, dict):  # some labels have no name
        given = {int(label): name for label, name in names.items()}
        return tuple(given.get(label, str(label)) for label in range(int(model.num_classes))), CONFIG  # type: ignore[arg-type]
    if names:
        return tuple(names), CONFIG
    subset = infer_imagenet_subset(model)
    return (tuple(ImageNetInfo(subset).label_names()), f"timm's {subset}") if subset else (None, "")
