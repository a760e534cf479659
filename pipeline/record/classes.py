"""classes.json: what the classes of a run are called, so that its model names them where the data is not at hand."""

import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.record.json_files import read_json
from shards.durable import replace_text
from shards.errors import UserError

CLASSES = "classes.json"


def keep_classes(run_dir: Path, classes: Sequence[str]) -> None:
    """RUN/classes.json: the names, in order of their labels."""
    run_dir.mkdir(parents=True, exist_ok=True)
    replace_text(run_dir / CLASSES, json.dumps(list(classes), indent=0) + "\n")


def read_classes(run_dir: Path) -> tuple[str, ...] | None:
    """What `keep_classes` kept; None of a run that kept none. Raises UserError where it is something else."""
    path = run_dir / CLASSES
    if not path.is_file():
        return None
    classes = read_json(path, list)
    if not all(isinstance(name, str) for name in classes):
        raise UserError(f"{path} is no list of names, as a run writes it: restore it from a copy, or remove it")
    return tuple(classes)
