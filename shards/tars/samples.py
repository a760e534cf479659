"""The samples of a WebDataset tar, whoever wrote it: adjacent members that share a key."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, BinaryIO

from shards.sources.base import MAX_IMAGE_BYTES
from shards.tars.walk import Member, unsafe_path, walk

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
_TEXT_FIELDS = ("cls", "json")
_CLASS_NAMES = ("wnid", "class_id", "synset")  # the fields of a json that may name the class
_MAX_TEXT_BYTES = 1 << 20
_MAX_CLASS_NAME = 200
_MAX_SHOWN = 200
META = re.compile(r"__[^/]*__($|/)")


class Unfit(ValueError):
    """Why a sample cannot be used."""


@dataclass
class TarSample:
    """A sample as it lies in a tar. `key` keeps the directory; `texts` are the contents of its cls and json.

    `problem` says why the sample cannot be used; "" where nothing speaks against it yet.
    """

    key: str
    problem: str = ""
    images: dict[str, Member] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    fields: list[str] = field(default_factory=list)

    def image(self) -> tuple[str, Member]:
        """Field and member of the image: the first of IMAGE_FIELDS. Unfit for a sample that cannot be used."""
        if self.problem:
            raise Unfit(self.problem)
        for name in IMAGE_FIELDS:
            if name in self.images:
                return name, self.images[name]
        raise Unfit(f"no image: it has {shown(', '.join(sorted(self.fields)))} and no {' or '.join(IMAGE_FIELDS)}")

    @cached_property
    def meta(self) -> dict[str, Any]:
        """What its json says, {} without one; Unfit where that is no JSON object."""
        if "json" not in self.texts:
            return {}
        try:
            meta = json.loads(self.texts["json"])
        except (ValueError, RecursionError) as error:
            raise Unfit(f"its json cannot be read ({type(error).__name__}: {error})") from error
        if not isinstance(meta, dict):
            raise Unfit(f"its json is no object but a {type(meta).__name__}")
        return meta

    def label(self, name: str = "") -> int:
        """The integer in field `name` of its json; without a name, that of its cls, else `label` of its json.

        Unfit where there is none from 0 on.
        """
        if not name and "cls" in self.texts:
            text = self.texts["cls"].strip()
            # No label has more digits, and Python's int() takes longer than linear for a million.
            value: Any = int(text) if text.isdigit() and len(text) <= 10 else self.texts["cls"]
            where = "its cls"
        else:
            name = name or "label"
            value, where = self.meta.get(name), f"{name!a} of its json"
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        raise Unfit(
            "no label: it has neither cls nor json" if not self.texts else f"no label: {where} is {shown(value)}"
        )

    def class_name(self) -> str:
        """The class that its json names, "" for none. Unfit for a name of over 200 characters."""
        name = next((self.meta[name] for name in _CLASS_NAMES if isinstance(self.meta.get(name), str)), "")
        if len(name) > _MAX_CLASS_NAME:
            raise Unfit(f"its class has a name of {len(name)} characters, more than {_MAX_CLASS_NAME}")
        return name


def samples_of(file: BinaryIO, end: int | None = None) -> Iterator[TarSample]:
    """The samples of a tar in its order; memory grows with its number of keys. No image content is read.

    WebDataset's rules: a member's key is its path up to the first dot of its last component, its field the rest in
    lower case; directories, names without a field and names like `__this__` are passed over. `file` and `end` as for
    `shards.tars.walk.walk`, whose UserErrors these are.
    """
    sample, seen = None, set[str]()
    for member in walk(file, end):
        key, name = split_name(member.name)
        if not name or member.kind == "directory" or META.match(member.name):
            continue
        if sample is None or sample.key != key:
            if sample:
                yield sample
            sample = TarSample(key, _unfit(key, seen))
            seen.add(key)
        _add(sample, name, member, file)
    if sample:
        yield sample


def shown(value: object) -> str:
    """Something from outside in printable characters, cut where it is very long."""
    text = ascii(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _add(sample: TarSample, name: str, member: Member, file: BinaryIO) -> None:
    problem = _misfit(sample, name, member)
    sample.problem = sample.problem or problem
    sample.fields.append(name)
    if name in IMAGE_FIELDS:
        sample.images[name] = member
    elif name in _TEXT_FIELDS and not problem:
        file.seek(member.offset)
        sample.texts[name] = file.read(member.size)


def _misfit(sample: TarSample, name: str, member: Member) -> str:
    """Why a member spoils its sample; "" where it does not."""
    if name not in (*IMAGE_FIELDS, *_TEXT_FIELDS):
        return ""
    if member.kind != "file":
        return f"its {name} is a link" if member.kind == "link" else f"its {name} is no plain file"
    if name in sample.fields:
        return f"two members are its {name}"
    largest = MAX_IMAGE_BYTES if name in IMAGE_FIELDS else _MAX_TEXT_BYTES
    if not 0 < member.size <= largest:
        return f"its {name} has {member.size} bytes; 1 to {largest} are accepted"
    return ""


def _unfit(key: str, seen: set[str]) -> str:
    """Why samples cannot have this key; "" where they can."""
    if reason := unsafe_path(key):
        return reason
    if key in seen:
        return "its key comes twice in the tar"
    return "" if _is_utf8(key) else "its name is not UTF-8"


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def split_name(name: str) -> tuple[str, str]:
    """Key and field; no field where the last component has no dot, or begins with one."""
    directory, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return directory + slash + stem, extension.lower() if stem else ""
