"""Reading: positions of many files, and one from front to back under a hash."""

import hashlib
import os
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO

_MAX_OPEN_FILES = 64
_CHUNK_BYTES = 1 << 20


class OpenFiles:
    """The files read last, opened when first needed; a forked child opens its own."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._descriptors: OrderedDict[Path | str, int] = OrderedDict()

    def read(self, path: Path | str, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size) of a file; OSError where it is missing or shorter."""
        data = os.pread(self._descriptor(path), size, offset)
        if len(data) < size:
            raise OSError(f"the file ends after {len(data)} of {size} bytes at offset {offset}")
        return data

    def _descriptor(self, path: Path | str) -> int:
        if self._owner != os.getpid():
            self.close()
            self._owner = os.getpid()
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY)
            if len(self._descriptors) > _MAX_OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors.move_to_end(path)
        return self._descriptors[path]

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __del__(self) -> None:
        self.close()


class HashedReader:
    """A file that is sought forward only, by reading on, so that all of it is hashed."""

    def __init__(self, file: BinaryIO) -> None:
        self.name = file.name
        self._file = file
        self._hash = hashlib.sha256()
        self._position = 0

    def tell(self) -> int:
        return self._position

    def read(self, count: int) -> bytes:
        data = self._file.read(count)
        self._hash.update(data)
        self._position += len(data)
        return data

    def seek(self, position: int) -> int:
        while self._position < position and self.read(min(_CHUNK_BYTES, position - self._position)):
            pass
        return self._position

    def sha256(self) -> str:
        """Of the whole file, which is read to its end."""
        while self.read(_CHUNK_BYTES):
            pass
        return self._hash.hexdigest()


def has_sha256(path: Path, sha256: str) -> bool:
    """Whether a file is there and has that hash."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except FileNotFoundError:
        return False
