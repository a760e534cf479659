"""JSON files of a run, read back."""

import json
from pathlib import Path
from typing import TypeVar

from shards.errors import UserError

T = TypeVar("T")


def read_json(path: Path, kind: type[T]) -> T:
    """What a file holds. Raises UserError where that is no `kind` in JSON."""
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, kind):
            raise ValueError(f"a {type(found).__name__}, and no {kind.__name__}")
        return found
    except ValueError as error:
        raise UserError(f"{path} is not the JSON that a run writes ({error}): restore it from a copy") from error


def read_lines(path: Path) -> list[dict]:
    """The whole lines of a file of JSON objects; none where it is missing. What a killed process tore is left out."""
    texts = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [line for text in texts if (line := _parsed(text)) is not None]


def _parsed(text: str) -> dict | None:
    try:
        found = json.loads(text) if text.endswith("\n") else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
