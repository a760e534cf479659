"""Recipes as files, YAML or JSON: some fields or all, by their names on the command line, in sections or in full.

    data:
      path: data/imagenet1k
    schedule.length: 100 epochs

A value is read as the command line would read its text, by its field's type: 1e-4 is a number, off is a word.
"""

import contextlib
import difflib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

import tyro
import yaml

from pipeline.recipe.leaves import flatten, kinds, unflatten
from shards.errors import UserError

T = TypeVar("T")
_TAG = "tag:yaml.org,2002:"
_INFINITE = {".inf": "inf", "-.inf": "-inf"}


def with_file(form: T, path: str) -> T:
    """`form` with the fields that a file gives. Raises UserError where it cannot be read, and as `with_text` does."""
    try:
        return with_text(form, Path(path).read_text(), path)
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def with_text(form: T, text: str, path: str) -> T:
    """`form` with the fields that the text of a file gives.

    Raises UserError, which calls it `path` and lists everything that is wrong with what it says.
    """
    known, wrong = kinds(type(form)), []
    lines: dict[str, int] = {}
    given: dict[str, object] = {}
    for name, node in _read(text, path):
        line = node.start_mark.line + 1
        if name not in known:
            wrong.append(f"line {line}: {_unknown(name, known)}")
        elif name in lines:
            wrong.append(f"line {line}: {name} is given a second time, first in line {lines[name]}: leave one out")
        else:
            lines[name] = line
            try:
                given[name] = _value(node, known[name])
            except ValueError:
                wrong.append(f"line {line}: {name} {_shown(node)}: it takes {expected(known[name])}")
    if wrong:
        raise UserError(f"{path} is no file of this recipe:\n" + "\n".join(f"  - {message}" for message in wrong))
    return unflatten(flatten(form) | given, type(form))


def as_text(leaves: Mapping[str, object], sources: Mapping[str, str]) -> str:
    """YAML that `with_file` reads back to the same values; a comment tells the source of what is no default."""
    return "".join(
        _line(name, value) + ("\n" if sources[name] == "default" else f"  # {sources[name]}\n")
        for name, value in leaves.items()
    )


def _line(name: str, value: object) -> str:
    in_brackets = None if isinstance(value, list) else False
    text = yaml.safe_dump({name: value}, default_flow_style=in_brackets, allow_unicode=True, width=float("inf"))
    return text.rstrip("\n")


def expected(kind: Any) -> str:
    """What a field of that type takes, in words."""
    core = _core(kind)
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if get_origin(core) is Literal:
        text = "one of " + ", ".join(get_args(core))
    elif get_origin(core) is tuple:
        of = [words[each] for each in get_args(core) if each is not ...]
        text = f"a list, each {of[0]}" if ... in get_args(core) else f"a list: [{', '.join(of)}]"
    else:
        text = words.get(core, str(core))
    return text if core is kind else f"{text}, or null"


def _read(text: str, path: str) -> list[tuple[str, yaml.Node]]:
    """The names that the text gives, and their values, which know their lines."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if isinstance(node, yaml.MappingNode):
            return list(_leaves(node))
    except yaml.YAMLError as error:
        raise _unreadable(path, error) from error
    except RecursionError as error:
        raise _unreadable(path, "it nests without end, as by an alias within what it stands for") from error
    raise UserError(f"{path} holds no fields of a recipe: give some as 'data.path: DIRECTORY', each on its line")


def _unreadable(path: str, error: object) -> UserError:
    return UserError(
        f"{path} cannot be read as a recipe ({error}): give YAML or JSON as --print prints it, or a run's recipe.json"
    )


def _leaves(mapping: yaml.Node, prefix: str = "") -> Iterator[tuple[str, yaml.Node]]:
    for key, node in mapping.value:
        name = prefix + str(key.value).replace("-", "_")
        if isinstance(node, yaml.MappingNode):
            yield from _leaves(node, f"{name}.")
        else:
            yield name, node


def _value(node: yaml.Node, kind: Any) -> object:
    """Raises ValueError where the field's type takes no such value."""
    core = _core(kind)
    if node.tag == f"{_TAG}null":
        if core is kind:  # also of text: "null" is hardly meant for a path or a project
            raise ValueError
        return None
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    is_list = get_origin(core) is tuple
    if is_list != isinstance(node, yaml.SequenceNode) or not all(isinstance(item, yaml.ScalarNode) for item in items):
        raise ValueError
    if core is str:
        return node.value
    if core is bool and node.tag == f"{_TAG}bool":
        return yaml.safe_load(node.value)
    return _typed([_INFINITE.get(item.value, item.value) for item in items], core)


def _typed(texts: list[str], kind: Any) -> object:
    """The value that the command line makes of these texts."""
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return tyro.cli(kind, args=texts, add_help=False, console_outputs=False)
    except SystemExit as error:
        raise ValueError from error


def _core(kind: Any) -> Any:
    """The type itself, without a None beside it."""
    options = get_args(kind)
    return next(each for each in options if each is not NoneType) if NoneType in options else kind


def _unknown(name: str, known: Mapping[str, Any]) -> str:
    fields = [field for field in known if field.startswith(f"{name}.")]
    if fields:
        return f"{name} is a section: give its fields, as {fields[0]}"
    last = name.rpartition(".")[2]
    namesakes = [field for field in known if field.rpartition(".")[2] == last]
    near = difflib.get_close_matches(name, namesakes or known, n=1, cutoff=0.0)
    return f"{name} is no field; the nearest is {near[0]}"


def _shown(node: yaml.Node) -> str:
    return repr(node.value) if isinstance(node, yaml.ScalarNode) else repr([item.value for item in node.value])
