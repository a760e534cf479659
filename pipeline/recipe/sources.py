"""Where the value of each field comes from."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.recipe.leaves import flatten
from pipeline.recipe.sections import Recipe


def trace(parsed: Any, forms: Mapping[str, Any]) -> Any:
    """The parsed command line, whose recipes remember their `origin`: the forms that it went through, by their names
    and in their order, of which the last is what was parsed."""
    if isinstance(parsed, Recipe):
        return dataclasses.replace(parsed, origin=tuple((name, flatten(form)) for name, form in forms.items()))
    changes = {
        each: trace(getattr(parsed, each), {name: getattr(form, each) for name, form in forms.items()})
        for each in _stages(parsed)
    }
    return dataclasses.replace(parsed, **changes)


def sources(recipe: Recipe) -> dict[str, str]:
    """For each field by its name: "default", or the last form in which its value changed: "recipe", "--debug", "file
    NAME" or "command line"; "chain" where it was changed after that, "program" where no command line was parsed."""
    last = "chain" if recipe.origin else "program"
    return changes([("default", flatten(Recipe())), *recipe.origin, (last, flatten(recipe))])


def changes(forms: Iterable[tuple[str, Mapping[str, object]]]) -> dict[str, str]:
    """For each field the name of the last of these forms in which its value changed."""
    (first, leaves), *_ = forms = [*forms]
    found = dict.fromkeys(leaves, first)
    for (_, before), (name, after) in itertools.pairwise(forms):
        found |= {field: name for field, value in after.items() if field not in before or value != before[field]}
    return found


def defaults(parsed: Any) -> dict[str, object]:
    """What a recipe, or the sections of something that holds recipes, have without any recipe file; by the names of
    `flatten`."""
    if isinstance(parsed, Recipe):
        return flatten(Recipe())
    sections: dict[str, Any] = {item.name: getattr(parsed, item.name) for item in dataclasses.fields(parsed)}
    names = [name for name, section in sections.items() if dataclasses.is_dataclass(section)]
    return {f"{name}.{leaf}": value for name in names for leaf, value in flatten(type(sections[name])()).items()}


def _stages(parsed: Any) -> list[str]:
    """Names of the fields that are recipes."""
    return [item.name for item in dataclasses.fields(parsed) if isinstance(getattr(parsed, item.name), Recipe)]
