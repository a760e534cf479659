"""Recipes as flat mappings, by the names that fields have on the command line.

They serve what holds recipes, too: a chain's dataclass, whose stages' fields are called "pretrain.data.path".
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

T = TypeVar("T")


def flatten(recipe: object, prefix: str = "") -> dict[str, object]:
    """{"data.path": ..., ...}: every leaf of a recipe by its name on the command line; what is not compared is none."""
    leaves: dict[str, object] = {}
    for item in _fields(recipe):
        value = getattr(recipe, item.name)
        if dataclasses.is_dataclass(value):
            leaves |= flatten(value, f"{prefix}{item.name}.")
        else:
            leaves[prefix + item.name] = list(value) if isinstance(value, tuple) else value
    return leaves


def kinds(of: type, prefix: str = "") -> dict[str, Any]:
    """The type of every leaf that `flatten` gives."""
    hints: dict[str, Any] = get_type_hints(of)
    found: dict[str, Any] = {}
    for item in _fields(of):
        hint = hints[item.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            found |= kinds(hint, f"{prefix}{item.name}.")
        else:
            found[prefix + item.name] = hint
    return found


def _fields(recipe: Any) -> list[dataclasses.Field]:
    return [item for item in dataclasses.fields(recipe) if item.compare]


def unflatten(leaves: Mapping[str, object], kind: type[T]) -> T:
    """The recipe of that type whose `flatten` these are, as read back from recipe.json."""
    hints: dict[str, Any] = get_type_hints(kind)
    values: dict[str, object] = {}
    for item in _fields(kind):
        hint = hints[item.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            inner = {name.partition(".")[2]: leaf for name, leaf in leaves.items() if name.startswith(f"{item.name}.")}
            values[item.name] = unflatten(inner, hint)
        else:
            leaf = leaves[item.name]
            values[item.name] = tuple(leaf) if isinstance(leaf, list) else leaf
    return kind(**values)
