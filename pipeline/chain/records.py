"""What a chain remembers: CHAIN/chain.json, the stages and their directories; STAGE/provenance.json, what went in and
came out."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.chain.stage import Stage
from pipeline.record import code_version
from shards.durable import replace_text
from shards.errors import UserError

BOOK, PROVENANCE = "chain.json", "provenance.json"


@dataclass(frozen=True)
class Book:
    """The directories of each stage below the chain's, oldest first: the last is the one in use, the others stay as
    they are. `again`: the stage of a --from that is not finished yet."""

    directories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    again: str = ""

    def current(self, stage: Stage) -> str:
        return self.directories.get(stage.name, (stage.directory,))[-1]

    def unused(self, stage: Stage, root: Path) -> str:
        """A new directory for the stage."""
        taken = set(self.directories.get(stage.name, ()))
        number = 2
        while (name := f"{stage.directory}-{number}") in taken or (root / name).exists():
            number += 1
        return name


def read_book(root: Path) -> Book:
    """Raises UserError where it is damaged."""
    path = root / BOOK
    if not path.is_file():
        return Book()
    try:
        kept = json.loads(path.read_text())
        directories = {entry["name"]: (*entry["earlier"], entry["run_dir"]) for entry in kept["stages"]}
        return Book(directories, kept["again"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not what a chain writes ({type(error).__name__}: {error}); it says which directory of a stage "
            "is in use: restore it from a copy, or give another --run-dir"
        ) from error


def write_book(root: Path, stages: Sequence[Stage], book: Book) -> None:
    entries = []
    for stage in stages:
        *earlier, current = book.directories.get(stage.name, (stage.directory,))
        after = [stage.start_from] if stage.start_from else []
        entry = {"name": stage.name, "kind": stage.kind, "after": after, "run_dir": current, "earlier": earlier}
        entries.append(entry)
    root.mkdir(parents=True, exist_ok=True)
    replace_text(root / BOOK, json.dumps({"stages": entries, "again": book.again}, indent=1) + "\n")


def read_provenance(directory: Path) -> dict[str, Any]:
    """{} where there is none. Raises UserError where it is damaged."""
    path = directory / PROVENANCE
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"{path} is not the JSON that a chain writes ({error}); without it nobody knows what went into the stage: "
            "restore it from a copy, or give --from with the stage's name to do it again in a new directory"
        ) from error


def write_provenance(directory: Path, found: Mapping[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    replace_text(directory / PROVENANCE, json.dumps({**found, "commit": code_version()}, indent=1) + "\n")


def describe_files(directory: Path, files: Sequence[Path]) -> dict[str, dict[str, object]]:
    """{path below the directory: {"size", "sha256"}}."""
    return {
        str(path.relative_to(directory)): {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in files
    }


def sha256_of(path: Path) -> str:
    """Raises UserError where the file cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}), but a stage needs it: restore it") from error
