"""From a command of another program to a recipe: `python tools/from_upstream.py COMMAND.txt > RECIPE.yaml`.

COMMAND.txt holds a command of ViTTM's train_lt.py, of DeiT's main.py or EfficientTrain's ET_training.py (with ToE), or
of timm's train.py (LTM), as its README has it; - reads it from stdin, and its words may stand behind --. It is read,
not run. What comes out is for --recipe: beside each field the flag that it is from, below what became of the other
flags, and above the command that trains it. Contradictions are told on stderr, too.

Exit code 0: converted; 2: it cannot be, and why.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.recipe import Recipe, with_text
from pipeline.validate import validate
from shards.errors import UserError
from tools.upstream_convert import choose, command_line, convert, take
from tools.upstream_flags import LAUNCHERS, PROGRAMS, SCRIPTS
from tools.upstream_shell import read, split
from tools.upstream_types import KINDS, Converted, Flag, Given, Program


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else [*argv]
    behind = words[words.index("--") + 1 :] if "--" in words else []
    options = _parser().parse_args(words[: len(words) - len(behind) - bool(behind)])
    if options.table:
        print("\n".join(table()))
        return 0
    try:
        command = split(behind, SCRIPTS) if behind else read(_text(options.command), SCRIPTS)
        given = take(PROGRAMS[options.program] if options.program else choose(command), command)
        found = convert(given)
        told = "\n".join(lines(given, found))
        if not given.program.waits:
            _check(told)
        print(told)
        for sentence in found.contradictions:
            print(f"contradiction: {sentence}", file=sys.stderr)
        if given.program.waits:
            raise UserError(f"no recipe can be made of a command of {given.program.title}: {_waits(given.program)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def lines(given: Given, found: Converted) -> Iterator[str]:
    """The recipe as YAML, with everything that is to be said as comments."""
    yield f"# From a command of {given.program.title}."
    if given.program.waits:
        yield f"# no recipe: {_waits(given.program)}"
    elif "model.name" in found.fields:
        yield f"# {command_line(given)}"
    else:
        yield "# no command: --model is not given; the fields are good for --recipe with one"
    for name, (text, why) in found.fields.items():
        yield f"{name}: {_quoted(text)}  # {why}"
    if found.open:
        yield f"# not given, so that the recipe's own values stay: {', '.join(found.open)}"
    for kind, title in KINDS.items():
        yield from (f"# {title} {remark}" for remark in found.remarks[kind])
    yield from (f"# contradiction: {sentence}" for sentence in found.contradictions)


def table() -> Iterator[str]:
    """The table of README.md: flags with the same answer share a line."""
    yield "| program | flags | here |"
    yield "|---|---|---|"
    for program in (*PROGRAMS.values(), LAUNCHERS):
        answers: dict[str, list[str]] = {}
        for flag in program.flags:
            answers.setdefault(_answer(flag), []).extend(f"`{name}`" for name in flag.names.split())
        for answer, names in answers.items() or {f"*not there yet:* {program.waits}": ["(none)"]}.items():
            yield f"| {_title(program)} | {', '.join(names)} | {answer} |"


def _answer(flag: Flag) -> str:
    if flag.kind != "field":
        return f"*{KINDS[flag.kind]}* {flag.remark}".replace("**kwargs", "\\*\\*kwargs")
    remark = f": {flag.remark}" if flag.remark else ""
    if flag.takes:
        return f"`{flag.field}`" + (f" as `{flag.form.format('N')}`" if flag.form != "{}" else "") + remark
    form = f" is `{flag.form}`" if flag.form else ""
    return f"`{flag.field}`{form}" + (f", without it `{flag.default}`" if flag.default else "") + remark


def _waits(program: Program) -> str:
    return f"{KINDS['later']} {program.waits}"


def _title(program: Program) -> str:
    scripts = f" (`{'`, `'.join(program.scripts)}`)" if program.scripts else ""
    return program.title + scripts


def _check(text: str) -> None:
    """Raises UserError where it is no recipe."""
    validate(with_text(Recipe(), text, "what the command comes to"))


def _quoted(text: str) -> str:
    return text if re.fullmatch(r"[\w./+-]+( [\w./+-]+)*|\[[\d., ]+\]", text) else json.dumps(text, ensure_ascii=False)


def _text(path: str) -> str:
    if path == "-":
        return sys.stdin.read()
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): give a text file that holds the command, or -") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", nargs="?", default="-", metavar="COMMAND.txt", help="default: -, stdin")
    add("--program", choices=PROGRAMS, help="default: as the script's name and its flags tell")
    add("--table", action="store_true", help="print the table of README.md instead")
    return parser


if __name__ == "__main__":
    sys.exit(main())
