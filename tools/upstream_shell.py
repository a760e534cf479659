"""Command lines of other programs as text: read, never run.

READMEs have comments behind their backslashes and lines that lack one, which a shell would stumble over.
"""

import itertools
import re
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.errors import UserError

_ASSIGNMENT = re.compile(r"(\w+)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Command:
    """`launcher`: the words before `script`; `arguments`: those behind it."""

    launcher: tuple[str, ...]
    script: str
    arguments: tuple[str, ...]

    def launched(self, flag: str) -> str | None:
        """What the launcher is given by `flag`, as --nproc_per_node=4 or --nproc_per_node 4."""
        words = [*self.launcher, ""]
        for word, following in itertools.pairwise(words):
            name, has_value, value = word.partition("=")
            if name == flag:
                return value if has_value else following
        return None


def read(text: str, scripts: Collection[str]) -> Command:
    """The one command of a text that starts one of the `scripts`, its variables filled in from assignments.

    Raises UserError where there is none, or more than one.
    """
    variables: dict[str, str] = {}
    found = []
    for line in _joined(text):
        try:
            words = shlex.split(line)
        except ValueError as error:
            raise UserError(f"the command '{line[:60]}' cannot be read ({error}): mend its quotes") from error
        words = [_filled(word, variables) for word in words if word != "$@"]
        while words and (assigned := _ASSIGNMENT.fullmatch(words[0])):
            variables[assigned[1]] = assigned[2]
            words = words[1:]
        if any(Path(word).name in scripts for word in words):
            found.append(split(words, scripts))
    if len(found) != 1:
        raise UserError(
            f"{len(found) or 'no'} commands of a known program are there, which start {', '.join(sorted(scripts))}: "
            "give the text of one"
        )
    return found[0]


def split(words: Sequence[str], scripts: Collection[str]) -> Command:
    """Raises UserError where no word is one of the `scripts`."""
    for place, word in enumerate(words):
        if Path(word).name in scripts:
            return Command(tuple(words[:place]), Path(word).name, tuple(words[place + 1 :]))
    raise UserError(f"the command starts none of the known programs, {', '.join(sorted(scripts))}: {shlex.join(words)}")


def _joined(text: str) -> list[str]:
    """Lines that a backslash continues as one, without comments; one that begins with a flag continues what is above
    it, too."""
    found: list[str] = []
    goes_on = False
    for line in text.splitlines():
        bare = _uncommented(line).strip()
        words = bare.rstrip("\\").rstrip()
        if not words:  # a flag that is commented out does not end the command; an empty line does
            goes_on = goes_on and bool(line.strip())
        elif found and (goes_on or words.startswith("-")):
            found[-1] += f" {words}"
            goes_on = bare.endswith("\\")
        else:
            found.append(words)
            goes_on = bare.endswith("\\")
    return found


def _uncommented(line: str) -> str:
    """Up to a # that begins a word outside of quotes."""
    quote = ""
    for place, letter in enumerate(line):
        if letter in "'\"" and quote in ("", letter):
            quote = "" if quote else letter
        elif letter == "#" and not quote and (place == 0 or line[place - 1].isspace()):
            return line[:place]
    return line


def _filled(word: str, variables: dict[str, str]) -> str:
    return re.sub(r"\$\{?(\w+)\}?", lambda match: variables.get(match[1], match[0]), word)
