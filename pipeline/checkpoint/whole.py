"""What makes a directory whole: every file flushed and hashed, the hashes in a manifest, its own hash in COMMITTED."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from shards.durable import atomic_file, sync_directory

MANIFEST = "manifest.json"
COMMITTED = "COMMITTED"


def make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def file_names(directory: Path) -> list[str]:
    """Of every file below, relative to `directory`, sorted."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def flushed_hash(path: Path) -> dict:
    """Size and hash of a file that has reached the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def seal(directory: Path, hashes: dict[str, dict]) -> None:
    """Writes the manifest and, last, what commits it."""
    manifest = json.dumps(hashes, indent=1, sort_keys=True)
    write_bytes(directory / MANIFEST, manifest.encode())
    write_bytes(directory / COMMITTED, _sha256(manifest).encode())
    for path in (directory, *(path for path in directory.rglob("*") if path.is_dir())):
        sync_directory(path)


def remove(directories: Iterable[Path]) -> None:
    """COMMITTED goes first, so that a half-removed one is never loaded."""
    for directory in directories:
        (directory / COMMITTED).unlink(missing_ok=True)
        shutil.rmtree(directory)


def read_manifest(directory: Path) -> dict[str, dict] | str:
    """The manifest, or why it cannot be trusted."""
    try:
        text, committed = (directory / MANIFEST).read_text(), (directory / COMMITTED).read_text()
        return json.loads(text) if committed == _sha256(text) else f"{COMMITTED} does not match {MANIFEST}"
    except (OSError, ValueError) as error:
        return f"not committed: {error}"


def difference(directory: Path, name: str, entry: dict) -> str:
    """How a file differs from its entry in the manifest; "" where it does not."""
    try:
        with (directory / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"{name}: {error}"
    return "" if digest == entry["sha256"] else f"{name}: its SHA-256 is not the manifest's"


def write_bytes(path: Path, data: bytes) -> None:
    with atomic_file(path) as file:
        file.write(data)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
