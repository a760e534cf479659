"""Files read as they are found: those of a run that goes on, or was killed, may be missing or torn."""

import json
import sys
from pathlib import Path
from typing import Any


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is none."""
    return _object(_text(path))


def read_objects(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file's lines; what is torn or something else is left out."""
    return [found for line in _text(path).splitlines() if (found := _object(line))]


def number(value: object) -> float | None:
    """The value, where it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) <= sys.float_info.max else None


def modified(path: Path) -> float:
    """When a file was last written to, in seconds since 1970; 0 where it is missing."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
