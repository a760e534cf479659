"""Where the value of each field comes from."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from pipeline.recipe.leaves import flatten
from pipeline.recipe.sections import Recipe


def trace(parsed: Any, forms: Mapping[str, Any]) -> Any:
    """The parsed command line, whose recipes remember their `origin`: the forms that it went through, by their names
    and in their order, of which the last is what was parsed."""
    if isinstance(parsed, Recipe):
        return dataclasses.replace(parsed, origin=tuple((name, flatten(form)) for name, form in forms.items()))
    recipes = {item.name for item in dataclasses.fields(parsed) if isinstance(getattr(parsed, item.name), Recipe)}
    changes = {
        each: trace(getattr(parsed, each), {name: getattr(form, each) for name, form in forms.items()})
        for each in recipes
    }
    return dataclasses.replace(parsed, **changes)


def sources(recipe: Recipe) -> dict[str, str]:
    """For each field by its name: "default", or the last form in which its value changed: "recipe", "--debug" or
    "command line"; "chain" where it was changed after that, "program" where no command line was parsed."""
    last = "chain" if recipe.origin else "program"
    forms = [("default", flatten(Recipe())), *recipe.origin, (last, flatten(recipe))]
    found = dict.fromkeys(flatten(recipe), "default")
    for (_, before), (name, after) in itertools.pairwise(forms):
        found |= {field: name for field, value in after.items() if value != before[field]}
    return found
