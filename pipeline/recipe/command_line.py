"""The command line that overrides a recipe's fields."""

import argparse
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from pipeline.recipe.sources import trace

T = TypeVar("T")


def parse(
    make: Callable[[str, bool], T], models: Sequence[str], description: str, args: Sequence[str] | None = None
) -> T:
    """The recipe of a command line: make(model, debug), with the fields that further options override.

    models: what `--model` may be, the default first; `--debug` asks for the recipe's laptop-sized form. An unknown or
    ill-typed option prints the nearest good ones and exits with code 2; `--help` explains every field.
    """
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--model", choices=models, default=models[0])
    chooser.add_argument("--debug", action="store_true")
    chosen, rest = chooser.parse_known_args(args)
    recipe = make(chosen.model, chosen.debug)
    usage = (
        f"--model {{{','.join(models)}}} picks the recipe (here {chosen.model}), --debug its laptop-sized form; "
        "every option below overrides one field of it."
    )
    paragraphs = re.sub(r"\n(?=\S)", "\n\n", description)  # the help keeps paragraphs, not lines
    parsed = tyro.cli(type(recipe), default=recipe, description=f"{paragraphs}\n\n{usage}", args=rest)
    forms = {"recipe": make(chosen.model, False)} | ({"--debug": recipe} if chosen.debug else {})
    return trace(parsed, forms | {"command line": parsed})
