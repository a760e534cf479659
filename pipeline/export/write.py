"""A directory in timm's layout: model.safetensors, config.json, README.md, and other formats on request."""

import json
import os
import shutil
from dataclasses import dataclass
from math import floor, nextafter
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from pipeline.augment.device import IMAGENET_MEAN, IMAGENET_STD
from pipeline.augment.exact import EvalTransform
from pipeline.export.card import Licences, card
from pipeline.export.formats import check_onnx_installed, compare, images_for, write_onnx, write_torch_export
from pipeline.export.source import Source, build
from pipeline.record import read_classes
from shards.durable import explained
from shards.errors import UserError

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


@dataclass(frozen=True)
class Formats:
    """Beside timm's."""

    onnx: bool = False
    torch_export: bool = False


def write(source: Source, out: Path, formats: Formats, licences: Licences) -> dict[str, float]:
    """Writes the new directory `out`, whole or not at all; {file: how far its logits are from the model's}.

    Raises UserError where it cannot be written or something is missing, RuntimeError where a file computes otherwise
    than the model.
    """
    if out.exists():
        raise UserError(f"{out} exists: an export is written whole, into a new directory; remove it or name another")
    if formats.onnx:
        check_onnx_installed()
    aside = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    with explained(out):
        aside.mkdir(parents=True)
        try:
            found = _fill(aside, source, formats, licences)
            aside.rename(out)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return found


def _fill(directory: Path, source: Source, formats: Formats, licences: Licences) -> dict[str, float]:
    model = build(source)
    images = images_for(source.recipe.augment.image_size)
    named = {"label_names": read_classes(source.run_dir)}
    save_for_hf(model, str(directory), named, safe_serialization=True, data_config=_data_config(source))
    config = json.loads((directory / CONFIG).read_text())
    found = {WEIGHTS: _check_timm(directory, config, model, images)}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    (directory / CARD).write_text(card(source, config, parameters, licences))
    if formats.torch_export:
        found["model.pt2"] = write_torch_export(model, images, directory / "model.pt2")
    if formats.onnx:
        found["model.onnx"] = write_onnx(model, images, directory / "model.onnx")
    return found


def _data_config(source: Source) -> dict[str, Any]:
    """How evaluation prepares images, in timm's words; timm comes to the same pixels."""
    side = source.recipe.augment.image_size
    return {
        "input_size": (3, side, side),
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "interpolation": "bicubic",
        "crop_pct": crop_pct(EvalTransform.of(source.recipe)),
        "crop_mode": "center",
    }


def crop_pct(transform: EvalTransform) -> float:
    """The share of the resized image that is cut out, such that timm, which rounds S / share down, resizes likewise."""
    share = transform.image_size / transform.resized
    return share if floor(transform.image_size / share) == transform.resized else nextafter(share, 0)


@torch.no_grad()
def _check_timm(directory: Path, config: dict, model: nn.Module, images: Tensor) -> float:
    """That timm makes the same model of the files."""
    weights = directory / WEIGHTS
    again = timm.create_model(config["architecture"], checkpoint_path=weights, **config["model_args"]).eval()
    return compare(WEIGHTS, again(images), model(images), 0.0)
