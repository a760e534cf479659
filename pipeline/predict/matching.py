"""Which of a checkpoint's classes those of some data are."""

from collections import Counter
from collections.abc import Sequence

from pipeline.predict.checkpoint import Checkpoint
from shards.classes import some
from shards.errors import UserError

_GIVE = "give the names of its classes, in order of its labels, as --classes (1k, 21k-p or a text file)"


def match(names: Sequence[str], asked: Checkpoint, where: str) -> tuple[list[int], str]:
    """Labels of the checkpoint in order of the data's class names, and "name" or "number", which matched them.

    Names match names. Where they do not, numbers that stand for names ("0" to "999", as in ImageNet-V2) are labels;
    their order as text means nothing. Raises UserError for whatever else is not a class of the checkpoint.
    """
    known = {name: label for label, name in enumerate(asked.classes or ())}
    unknown = [name for name in names if name not in known]
    if not unknown:
        _check_once(names, asked)
        return [known[name] for name in names], "name"
    if all(_is_number(name) for name in names):
        return _numbers(names, asked, where), "number"
    if asked.classes is None:
        text = some([name for name in names if not _is_number(name)])
        raise UserError(
            f"{asked.name} does not say what its {asked.num_classes} classes are called, and {where} has "
            f"names: {text}; {_GIVE}"
        )
    raise UserError(
        f"{where} has {len(unknown)} classes of {len(names)} that {asked.name} does not have: {some(unknown)}. It has "
        f"{len(known)}: {some(list(known))}. Leave those out, or give a checkpoint that knows them; if only its names "
        f"({asked.named}) are wrong, {_GIVE}"
    )


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _numbers(names: Sequence[str], asked: Checkpoint, where: str) -> list[int]:
    numbers = [int(name) for name in names]
    beyond = [name for name, number in zip(names, numbers, strict=True) if number >= asked.num_classes]
    if beyond:
        raise UserError(
            f"{where} has classes that are numbers, which count the labels of {asked.name} from 0 to "
            f"{asked.num_classes - 1}, and {len(beyond)} are beyond: {some(beyond)}; give data of the same classes"
        )
    counts = Counter(numbers)
    twice = [name for name, number in zip(names, numbers, strict=True) if counts[number] > 1]
    if twice:
        raise UserError(f"{where} has numbers for classes twice: {some(twice)}; put their images into one folder each")
    return numbers


def _check_once(names: Sequence[str], asked: Checkpoint) -> None:
    counts = Counter(asked.classes)
    twice = [name for name in names if counts[name] > 1]
    if twice:
        raise UserError(f"{asked.name} has several classes of the same name: {some(set(twice))}; {_GIVE}")
