"""Start weights of a model: exactly those that were asked for, or an error; never a part of them in silence."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from pipeline.models.ltm import LTM
from pipeline.models.vittm import ViTTM
from pipeline.models.vittm.trunk import from_trunk
from shards.errors import UserError

_SHOWN = 5


@dataclass(frozen=True)
class Loaded:
    """What became of each weight, by name."""

    loaded: tuple[str, ...]
    made_new: tuple[str, ...]  # the model's own initialisation was kept
    dropped: tuple[str, ...]  # in the file, and not used
    resized: tuple[str, ...] = ()  # position tables of another image size, as they are in the file


def load_start(model: nn.Module, path: str | Path, *, new_heads: bool) -> Loaded:
    """Load the weights of the safetensors file `path` into `model`, whose names and shapes they must have, but that
    position tables of another image size are resized as timm resizes them.

    With `new_heads` the classifiers (timm's `get_classifier`) of a freshly built model stay as they are, whatever the
    file has for them; without, they are loaded, and must match like everything else. With it, too, an LTM may start
    from the model without merging: its mask modules stay as they are then.
    Raises UserError for a file that is missing, is not safetensors, or holds another model; nothing is loaded then.
    """
    return load_weights(model, read_weights(path), str(path), new_heads=new_heads)


def load_weights(model: nn.Module, stored: Mapping[str, Tensor], source: str, *, new_heads: bool) -> Loaded:
    """`load_start` of weights that are read already, which the user knows as `source`."""
    fitted = _fit(model, stored, source, new_heads)
    loaded = _load(model, fitted.wanted, fitted.given | fitted.resized)
    kept = tuple(name for name in loaded.loaded if name not in fitted.resized)
    dropped, resized = sorted(stored.keys() - fitted.given), sorted(fitted.resized)
    return replace(loaded, loaded=kept, dropped=tuple(dropped), resized=tuple(resized))


def check_start(model: nn.Module, earlier: nn.Module, source: str) -> None:
    """Raises UserError where `model` could not start, with new heads, from the weights of a model like `earlier`, which
    the user knows as `source`. Both may be on the meta device."""
    _fit(model, earlier.state_dict(), source, new_heads=True)


@dataclass(frozen=True)
class _Fitted:
    """Names that a model wants of a file, what it gets as it is there, and `resized` what replaces some of that."""

    wanted: list[str]
    given: dict[str, Tensor]
    resized: dict[str, Tensor]


def _fit(model: nn.Module, stored: Mapping[str, Tensor], source: str, new_heads: bool) -> _Fitted:
    heads = _classifier_prefixes(model)
    fresh = heads if new_heads else ()
    added = model.mask_names() if new_heads and isinstance(model, LTM) else []
    lacking = () if any(name in stored for name in added) else added
    wanted = [name for name in model.state_dict() if not name.startswith(fresh) and name not in lacking]
    given = {name: tensor for name, tensor in stored.items() if not name.startswith(fresh)}
    resized = _resized_tables(model, given)
    if misfits := _misfits(model, wanted, given | resized):
        raise UserError(_another_model(source, misfits, heads))
    return _Fitted(wanted, given, resized)


def load_trunk(model: nn.Module, stored: Mapping[str, Tensor], source: str, *, flexi: bool) -> Loaded:
    """Load the transformer blocks of timm's ViT `stored`, which the caller knows as `source`, into a new ViTTM; with
    `flexi` its 16x16 patch convolution too, resized. Everything else stays as it is.

    Raises UserError for a model that is no ViTTM, and for a ViT of another size; nothing is loaded then.
    """
    if not isinstance(model, ViTTM):
        raise UserError(
            f"model.init_from starts a ViTTM with the blocks of a ViT, but the model is a {type(model).__name__}: set "
            "it to none; model.start takes a whole checkpoint of any model."
        )
    wanted, given = from_trunk(model, stored, flexi)
    if misfits := _misfits(model, wanted, given):
        raise UserError(_another_trunk(source, misfits))
    loaded = _load(model, wanted, given)
    used = ("blocks.", "patch_embed.") if flexi else ("blocks.",)
    return replace(loaded, dropped=tuple(sorted(name for name in stored if not name.startswith(used))))


def _load(model: nn.Module, wanted: Sequence[str], given: Mapping[str, Tensor]) -> Loaded:
    """Load `given`, which has just the weights `wanted`, and keep the others."""
    own = model.state_dict()
    model.load_state_dict({**own, **given})
    return Loaded(tuple(wanted), tuple(name for name in own if name not in given), ())


def _resized_tables(model: nn.Module, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The position tables of `given`, [1, N, D], of another square grid of patches than the model's, for its grid."""
    tables = {name: own for name, own in model.state_dict().items() if name.rpartition(".")[2].endswith("pos_embed")}
    apart = 0 if getattr(model, "no_embed_class", True) else getattr(model, "num_prefix_tokens", 0)
    found = {}
    for name, own in tables.items():
        stored = given.get(name)
        if stored is None or stored.shape == own.shape or stored.ndim != 3 or stored.shape[2] != own.shape[2]:
            continue
        old, new = (math.isqrt(max(0, table.shape[1] - apart)) for table in (stored, own))
        if (old**2 + apart, new**2 + apart) == (stored.shape[1], own.shape[1]):
            found[name] = resample_abs_pos_embed(stored, [new, new], [old, old], apart)
    return found


def num_stored_classes(model: nn.Module, stored: Mapping[str, Tensor], source: str) -> int:
    """How many classes the classifiers of `model` have among weights that the user knows as `source`.

    Raises UserError where none of them is there.
    """
    names = [f"{prefix}weight" for prefix in _classifier_prefixes(model)]
    found = [stored[name].shape[0] for name in names if name in stored]
    if not found:
        raise UserError(f"{source} is a checkpoint of another model: it has no classifier {' or '.join(names)}.")
    return found[0]


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name. Raises UserError for a file that is missing or of another kind."""
    path = Path(path)
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


def _misfits(model: nn.Module, wanted: Collection[str], given: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of weights that are not the same in both -> the two shapes."""
    own = {name: tensor for name, tensor in model.state_dict().items() if name in wanted}
    shapes = {name: (_shape(given.get(name)), _shape(own.get(name))) for name in [*own, *(given.keys() - own)]}
    return {name: f"file {file}, model {model}" for name, (file, model) in sorted(shapes.items()) if file != model}


def _shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else str(tuple(tensor.shape))


def _another_trunk(source: str, misfits: Mapping[str, str]) -> str:
    head = f"{source} has not the blocks of this model: {len(misfits)} weights differ."
    remedy = (
        "Nothing was loaded; give model.init_weights a ViT of the same width, depth and heads, with LayerScale where "
        "the model has it, or set model.init_from to none."
    )
    return "\n".join([head, *_listed(misfits), remedy])


def _another_model(path: str | Path, misfits: Mapping[str, str], heads: tuple[str, ...]) -> str:
    remedy = "build the model with the options that the file was trained with, or give another file."
    if all(name.startswith(heads) for name in misfits):
        remedy = "only the classifiers differ: ask for new heads to train on these classes."
    head = f"{path} is a checkpoint of another model: {len(misfits)} weights differ, and a part of them is not a start."
    return "\n".join([head, *_listed(misfits), f"Nothing was loaded; {remedy}"])


def _listed(misfits: Mapping[str, str]) -> list[str]:
    lines = [f"  {name}: {shapes}" for name, shapes in list(misfits.items())[:_SHOWN]]
    return [*lines, f"  and {len(misfits) - _SHOWN} more"] if len(misfits) > _SHOWN else lines
