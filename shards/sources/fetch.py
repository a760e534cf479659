"""The fetchers that most sources share."""

import os

from shards.files import OpenFiles


class WholeFiles:
    """Containers are directories, and every entry a file of one."""

    def __call__(self, container: str, name: str, offset: int, size: int) -> bytes:
        with open(os.path.join(container, name), "rb", buffering=0) as file:
            return file.read()


class Ranges:
    """Containers are files, such as uncompressed tars, and every entry a range of one; read in any order."""

    def __init__(self) -> None:
        self._files = OpenFiles()

    def __call__(self, container: str, name: str, offset: int, size: int) -> bytes:
        return self._files.read(container, offset, size)
