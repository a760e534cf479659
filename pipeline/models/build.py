"""The model of a recipe, and the weights it starts from."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import timm
import torch
from torch import Tensor, nn

from pipeline.models.load import Loaded, load_start, load_trunk, load_weights, num_stored_classes, read_weights
from pipeline.models.vittm.trunk import TRUNKS
from pipeline.recipe import Model, Progressive, Recipe
from shards.errors import UserError

_NO_OPTIONS = ("name", "start", "init_from", "init_weights")
_RESIZING = {"dynamic_img_size": True}
"""Makes timm's models resize their positions in every forward pass, where images have another size than `img_size`."""


def make_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """The model on the CPU, initialised by the recipe's seed, the same on every rank.

    Raises UserError for an unknown model and for options that it does not take.
    """
    section = recipe.model
    torch.manual_seed(recipe.seed)
    given = {name: value for name, value in vars(section).items() if name not in _NO_OPTIONS and value is not None}
    if not timm.is_model(section.name):
        near = difflib.get_close_matches(section.name, timm.list_models(), n=3)
        raise UserError(f"model.name '{section.name}' is not in timm's registry; the nearest names there are {near}")
    options = given | (_RESIZING if _is_to_resize(recipe) else {})
    try:
        return timm.create_model(section.name, num_classes=num_classes, img_size=recipe.augment.image_size, **options)
    except (TypeError, AssertionError) as error:  # how timm's own models refuse
        if "dynamic_img_size" in str(error):
            raise UserError(
                f"progressive.image_sizes {recipe.progressive.image_sizes}: model.name '{section.name}' takes images "
                "of one size alone: leave it empty, or take a ViT, DeiT, T2T-ViT or ViTTM"
            ) from error
        raise UserError(f"model.name '{section.name}' does not take the options {given}: {error}") from error


def _is_to_resize(recipe: Recipe) -> bool:
    """Whether timm has to be told that images of several sizes come; our own models expect that."""
    ours = timm.model_entrypoint(recipe.model.name).__module__.startswith(__package__)
    return bool(recipe.progressive.image_sizes) and not ours


def trained_model(recipe: Recipe, weights: Mapping[str, Tensor], source: str) -> nn.Module:
    """The model of a recipe with all of its weights, which the user knows as `source` and which decide how many classes
    it has; on the CPU, in evaluation mode, for images of the size that it is evaluated on. Raises UserError where they
    are not those of such a model."""
    model = make_model(replace(recipe, progressive=Progressive()), num_classes=1)
    model.reset_classifier(num_stored_classes(model, weights, source))  # type: ignore[operator] # timm's models have it
    load_weights(model, weights, source, new_heads=False)
    return model.eval()


def give_start(model: nn.Module, section: Model) -> str:
    """Load the weights that the recipe starts from into a new model; says which, or that there are none.

    Raises UserError where they are of another model, or cannot be had; nothing is loaded then.
    """
    if section.start:
        return f"start weights {section.start}: {_summary(load_start(model, section.start, new_heads=True))}"
    if section.init_from == "none":
        return "start weights: none, every weight is new"
    source, trunk = _trunk(section)
    loaded = load_trunk(model, trunk, source, flexi=section.init_from == "blocks+flexi")
    return f"start weights {section.init_from} of {source}: {_summary(loaded)}"


def _summary(loaded: Loaded) -> str:
    resized = f"; resized: {_listed(loaded.resized)}" if loaded.resized else ""
    others = f"made new: {_listed(loaded.made_new)}; dropped: {_listed(loaded.dropped)}"
    return f"{len(loaded.loaded)} loaded{resized}; {others}"


def _listed(names: Sequence[str]) -> str:
    """The names, those of all layers as one."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)) or "none"


def _trunk(section: Model) -> tuple[str, Mapping[str, Tensor]]:
    """What the ViT is called that `init_from` takes from, and its weights."""
    if section.init_weights:
        return section.init_weights, read_weights(section.init_weights)
    name = TRUNKS.get(section.name)
    if name is None:
        raise UserError(
            f"model.init_from '{section.init_from}': no ViT of timm belongs to model.name '{section.name}', only to "
            f"{', '.join(TRUNKS)}: set it to none, or name a safetensors file of a ViT by model.init_weights."
        )
    try:
        return name, timm.create_model(name, pretrained=True).state_dict()
    except OSError as error:  # huggingface_hub's own are all of them
        raise UserError(
            f"model.init_from '{section.init_from}' starts from timm's {name}, which cannot be downloaded here "
            f"({error}): give the path of its model.safetensors as model.init_weights, or set model.init_from to none."
        ) from error
