"""Files that appear whole or not at all, also after a power cut, and a directory that one process writes at a time."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from shards.errors import UserError

_BUFFER_BYTES = 1 << 20


class HashedFile:
    """A file being written that counts and hashes what goes into it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.num_bytes += len(data)
        return self._file.write(data)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


@contextmanager
def atomic_file(path: Path) -> Iterator[HashedFile]:
    """A file written as `<path>.<pid>.tmp`, flushed to disk and renamed; removed when the body raises.

    UserError where the system cannot write it (a full disk, a read-only one, ...).
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with explained(path):
        try:
            with open(temporary, "wb", buffering=_BUFFER_BYTES) as file:
                yield HashedFile(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def replace_text(path: Path, text: str) -> None:
    """An `atomic_file` of text."""
    with atomic_file(path) as file:
        file.write(text.encode())


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds the OS lock of `directory`, which dies with the process; UserError where another process holds it."""
    with explained(directory), open(directory / ".lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process is writing shards to {directory}; wait until it ends, then run the same command again"
            ) from error
        yield


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns an OSError of the body, which writes `path`, into a UserError."""
    try:
        yield
    except OSError as error:
        existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        raise UserError(
            f"cannot write {path}: {error.strerror or error} ({shutil.disk_usage(existing).free} bytes are free). "
            "Make room or choose another directory, then run the same command again."
        ) from error


def sync_directory(directory: Path) -> None:
    """Makes renames inside `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
