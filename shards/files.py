"""Positional reads of many files."""

import os
from collections import OrderedDict
from pathlib import Path

_MAX_OPEN_FILES = 64


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
