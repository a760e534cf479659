"""Recipes as flat mappings, by the names that fields have on the command line."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

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


def _fields(recipe: Any) -> list[dataclasses.Field]:
    return [item for item in dataclasses.fields(recipe) if item.compare]


def unflatten(leaves: Mapping[str, object], kind: type[T]) -> T:
    """The recipe of that type whose `flatten` these are, as read back from recipe.json."""
    values: dict[str, object] = {}
    for item in _fields(kind):
        section = item.default_factory
        if dataclasses.is_dataclass(section):
            inner = {name.partition(".")[2]: leaf for name, leaf in leaves.items() if name.startswith(f"{item.name}.")}
            values[item.name] = unflatten(inner, section)
        else:
            leaf = leaves[item.name]
            values[item.name] = tuple(leaf) if isinstance(leaf, list) else leaf
    return kind(**values)
