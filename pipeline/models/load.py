"""Start weights of a model: exactly those of a safetensors file, or an error; never a part of them in silence."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from shards.errors import UserError

_SHOWN = 5


@dataclass(frozen=True)
class Loaded:
    """What became of each weight, by name."""

    loaded: tuple[str, ...]
    made_new: tuple[str, ...]  # the model's own initialisation was kept
    dropped: tuple[str, ...]  # in the file, and not used


def load_start(model: nn.Module, path: str | Path, *, new_heads: bool) -> Loaded:
    """Load the weights of the safetensors file `path` into `model`, whose names and shapes they must have.

    With `new_heads` the classifiers (timm's `get_classifier`) of a freshly built model stay as they are, whatever the
    file has for them; without, they are loaded, and must match like everything else.
    Raises UserError for a file that is missing, is not safetensors, or holds another model; nothing is loaded then.
    """
    path = Path(path)
    own, stored = model.state_dict(), _read(path)
    heads = _classifier_prefixes(model)
    fresh = heads if new_heads else ()
    wanted = {name: tensor for name, tensor in own.items() if not name.startswith(fresh)}
    given = {name: tensor for name, tensor in stored.items() if not name.startswith(fresh)}
    if misfits := _misfits(wanted, given):
        raise UserError(_another_model(path, misfits, heads))
    model.load_state_dict(own | given)
    made_new = tuple(name for name in own if name not in wanted)
    return Loaded(tuple(wanted), made_new, tuple(sorted(stored.keys() - given)))


def _read(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; start weights are one .safetensors file: give its path.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a safetensors file ({error}); other formats may run code when opened, so none is read: "
            "write the weights anew with safetensors.torch.save_file."
        ) from error


def _classifier_prefixes(model: nn.Module) -> tuple[str, ...]:
    """How the names of the classifiers' weights begin: timm gives one module, or a tuple of them."""
    classifiers = model.get_classifier()  # type: ignore[operator] # every model of timm has it
    modules = classifiers if isinstance(classifiers, tuple) else (classifiers,)
    return tuple(f"{name}." for name, module in model.named_modules() if any(module is head for head in modules))


def _misfits(wanted: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Names of weights that are not the same in both -> the two shapes."""
    shapes = {name: (_shape(given.get(name)), _shape(wanted.get(name))) for name in [*wanted, *(given.keys() - wanted)]}
    return {name: f"file {file}, model {model}" for name, (file, model) in sorted(shapes.items()) if file != model}


def _shape(tensor: torch.Tensor | None) -> str:
    return "none" if tensor is None else str(tuple(tensor.shape))


def _another_model(path: Path, misfits: Mapping[str, str], heads: tuple[str, ...]) -> str:
    lines = [f"  {name}: {shapes}" for name, shapes in list(misfits.items())[:_SHOWN]]
    more = [f"  and {len(misfits) - _SHOWN} more"] if len(misfits) > _SHOWN else []
    remedy = "build the model with the options that the file was trained with, or give another file."
    if all(name.startswith(heads) for name in misfits):
        remedy = "only the classifiers differ: ask for new heads to train on these classes."
    head = f"{path} is a checkpoint of another model: {len(misfits)} weights differ, and a part of them is not a start."
    return "\n".join([head, *lines, *more, f"Nothing was loaded; {remedy}"])
