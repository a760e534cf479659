"""The class lists of ImageNet, those of users, and what a source lacks of one."""

from collections.abc import Collection, Iterable
from importlib import resources
from pathlib import Path

from shards.errors import UserError

# The 1,000 wnids of ILSVRC 2012, and the 10,450 of ImageNet-21k-P (Winter 21), both sorted.
LISTS = {"1k": "imagenet1k.txt", "21k-p": "imagenet21k_p.txt"}
_MAX_TEXT_BYTES = 64 << 20
_MAX_LISTED = 10


def load_classes(name_or_file: str) -> tuple[str, ...]:
    """The classes of a list of LISTS, or of a text file with one class a line; a label is a position.

    UserError for a file that is missing, no text, empty, or that has an empty line or a class twice.
    """
    if name_or_file in LISTS:
        text = resources.files("shards").joinpath("class_lists", LISTS[name_or_file]).read_text("utf-8")
        return tuple(text.splitlines())
    path = Path(name_or_file)
    if not path.is_file():
        raise UserError(
            f"there is no class list {name_or_file!a}; give {' or '.join(LISTS)}, or the path of a text file with one "
            "class a line, in order of the labels"
        )
    lines = [line.strip() for line in read_lines(path, "a class list: one class a line")]
    _check_lines(path, lines)
    return tuple(lines)


def check_classes(found: Iterable[str], expected: tuple[str, ...], where: str) -> None:
    """UserError listing what `where` lacks of the expected classes, and what it has beyond them."""
    have, want = set(found), set(expected)
    parts = [
        f"{len(names)} {kind} ({some(names)})"
        for kind, names in (("missing", want - have), ("extra", have - want))
        if names
    ]
    if parts:
        raise UserError(
            f"{where} has {len(have)} classes and must have {len(want)}: {'; '.join(parts)}. Either its download or "
            "extraction is incomplete: finish it; or --classes is not the list of this source: correct it"
        )


def some(names: Collection[str]) -> str:
    """The first names in sorted order, printable, and how many more there are."""
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(ascii(name) for name in sorted(names)[:_MAX_LISTED]) + more


def read_lines(path: Path, kind: str) -> list[str]:
    """The lines of a small text file; UserError where it cannot be read, or is no UTF-8 text of less than 64 MiB."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read {str(path)!a}, {kind}: {error.strerror}") from error
    return text_lines(data, str(path), kind)


def text_lines(data: bytes, where: str, kind: str) -> list[str]:
    """The lines of a text file's bytes; UserError for one that is no UTF-8 or has more than 64 MiB."""
    if len(data) > _MAX_TEXT_BYTES:
        raise UserError(f"{where!a} has more than {_MAX_TEXT_BYTES} bytes and cannot be {kind}; give the right file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where!a} is not UTF-8 text ({error}) and cannot be {kind}; give the right file") from error
    return text.removesuffix("\n").replace("\r\n", "\n").split("\n") if text else []


def _check_lines(path: Path, lines: list[str]) -> None:
    if not lines:
        raise UserError(f"the class list {str(path)!a} is empty; write one class a line")
    first: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            raise UserError(f"line {number} of the class list {str(path)!a} is empty; write one class a line")
        if line in first:
            raise UserError(
                f"the class list {str(path)!a} has {line!a} twice, on lines {first[line]} and {number}; remove one"
            )
        first[line] = number
