"""What the flags of another program's command are, and what becomes of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from shards.errors import UserError

Kind = Literal["field", "said", "no effect", "later"]
KINDS: dict[Kind, str] = {
    "said": "no field of ours:",
    "no effect": "no effect in the authors' program:",
    "later": "not there yet:",
}


@dataclass(frozen=True)
class Flag:
    """`names`: as the program has them, between spaces. `field`: ours, which gets `form`, with the flag's value in
    place of {} (some are a list); `default` is what the flag is where it is not given (of a switch: what the field is
    then).

    `takes`: "" a switch, "1" a value, "+" some.
    """

    names: str
    field: str = ""
    remark: str = ""
    form: str = "{}"
    default: str = ""
    takes: Literal["", "1", "+"] = "1"
    kind: Kind = "field"

    @property
    def name(self) -> str:
        return self.names.split()[0]


@dataclass(frozen=True)
class Program:
    """`scripts`: what its command starts. `always`: fields that no flag of it changes. `waits`: why no recipe can be
    made of its commands; "" where one can."""

    title: str
    scripts: tuple[str, ...]
    flags: tuple[Flag, ...]
    always: dict[str, str] = field(default_factory=dict)
    waits: str = ""


def said(names: str, remark: str, takes: Literal["", "1", "+"] = "1", default: str = "") -> Flag:
    return Flag(names, remark=remark, takes=takes, kind="said", default=default)


def later(names: str, remark: str, takes: Literal["", "1", "+"] = "1", default: str = "") -> Flag:
    return Flag(names, remark=remark, takes=takes, kind="later", default=default)


def switch(names: str, field: str, given: str, missing: str, remark: str = "") -> Flag:
    return Flag(names, field, remark, given, missing, "")


@dataclass(frozen=True)
class Given:
    """A command's flags: the texts that each has, by its first name; words that belong to none; number of ranks."""

    program: Program
    values: Mapping[str, tuple[str, ...]]
    words: tuple[str, ...]
    ranks: int

    def text(self, name: str) -> str:
        """The flag's value, or its default; "" for a flag without both."""
        found = self.values.get(name)
        return " ".join(found) if found is not None else self.flag(name).default

    def flag(self, name: str) -> Flag:
        return next(flag for flag in self.program.flags if name in flag.names.split())

    def number(self, name: str) -> float:
        text = self.text(name)
        try:
            return float(text)
        except ValueError as error:
            raise UserError(f"{name} '{text}': it takes a number, for {self.flag(name).field} is made of it") from error


@dataclass
class Converted:
    """`fields`: text and origin of each; `remarks`: by kind; `open`: fields whose flag is missing, and its default not
    known; `contradictions`: sentences."""

    fields: dict[str, tuple[str, str]] = field(default_factory=dict)
    remarks: dict[Kind, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    open: list[str] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)
