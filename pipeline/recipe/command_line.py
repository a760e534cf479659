"""The command line that overrides a recipe's fields."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from pipeline.recipe.files import as_text, with_file
from pipeline.recipe.leaves import flatten
from pipeline.recipe.sources import changes, defaults, trace
from shards.errors import UserError

T = TypeVar("T")


def parse(
    make: Callable[..., T],
    models: Sequence[str],
    description: str,
    args: Sequence[str] | None = None,
    variants: Sequence[str] = (),
) -> T:
    """The recipe of a command line: make(model, debug) or, where there are variants, make(model, debug, variant); with
    the fields that `--recipe FILE` gives, and over these the ones that further options give.

    models, variants: what `--model` and `--variant` may be, the default first; `--debug` asks for the recipe's
    laptop-sized form. `--print` prints the result as such a file, and exits with code 0. An unknown or ill-typed
    option or field prints the nearest good ones and exits with code 2; `--help` explains every field.
    """
    chooser = _chooser(models, variants)
    chosen, rest = chooser.parse_known_args(args)
    try:
        forms = _forms(make, chosen, bool(variants))
    except UserError as error:
        chooser.exit(2, f"error: {error}\n")
    base = [*forms.values()][-1]
    _refuse_misspelt(chooser, rest, flatten(base))
    parsed = tyro.cli(type(base), default=base, description=_describe(description, chosen, models, variants), args=rest)
    forms["command line"] = parsed
    if chosen.print:
        _print(parsed, forms)
        chooser.exit(0)
    return trace(parsed, forms)


def _chooser(models: Sequence[str], variants: Sequence[str]) -> argparse.ArgumentParser:
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--model", choices=models, default=models[0])
    chooser.add_argument("--debug", action="store_true")
    chooser.add_argument("--recipe", metavar="FILE")
    chooser.add_argument("--print", action="store_true")
    if variants:
        chooser.add_argument("--variant", choices=variants, default=variants[0])
    return chooser


def _forms(make: Callable[..., T], chosen: argparse.Namespace, variants: bool) -> dict[str, T]:
    """What the recipe goes through before the options of the command line, by name."""
    more = [chosen.variant] if variants else []
    forms = {"recipe": make(chosen.model, False, *more)}
    if chosen.debug:
        forms["--debug"] = make(chosen.model, True, *more)
    if chosen.recipe:
        forms[f"file {chosen.recipe}"] = with_file([*forms.values()][-1], chosen.recipe)
    return forms


def _describe(description: str, chosen: argparse.Namespace, models: Sequence[str], variants: Sequence[str]) -> str:
    paragraphs = re.sub(r"\n(?=\S)", "\n\n", description)  # the help keeps paragraphs, not lines
    variant = f"--variant {{{','.join(variants)}}} its variant (here {chosen.variant}), " if variants else ""
    return (
        f"{paragraphs}\n\n--model {{{','.join(models)}}} picks the recipe (here {chosen.model}), {variant}--debug its "
        "laptop-sized form. --recipe FILE (YAML or JSON) overrides fields of it by their names, every option below "
        "one. --print prints the result as such a file, and stops."
    )


def _refuse_misspelt(chooser: argparse.ArgumentParser, rest: Sequence[str], leaves: Any) -> None:
    """An unknown option that is nearest to one of the chooser's own; tyro knows the others only."""
    own = [*chooser._option_string_actions]
    fields = [f"--{name.replace('_', '-')}" for name in leaves]
    for text in rest:
        option = text.partition("=")[0].replace("_", "-")
        near = difflib.get_close_matches(option, own + fields, n=1, cutoff=0.8) if option.startswith("--") else []
        if near and near[0] in own:
            chooser.exit(2, f"error: {option} is no option; the nearest is {near[0]}\n")


def _print(parsed: Any, forms: dict[str, Any]) -> None:
    """Of all ranks of a launch the first alone prints."""
    if os.environ.get("RANK", "0") != "0":
        return
    found = changes([("default", defaults(parsed)), *((name, flatten(form)) for name, form in forms.items())])
    sys.stdout.write("# Every field; --recipe FILE runs it again. Comments tell where what is no default comes from.\n")
    sys.stdout.write(as_text(flatten(parsed), found))
    sys.stdout.flush()
