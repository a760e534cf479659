"""Images in files of their own as samples, read as `shards.reader.Reader` reads those of shards."""

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.reader import MAX_SAMPLE_BYTES, BadSample
from shards.sources.base import Entry, Rejected
from shards.sources.folders import ClassFolders

T = TypeVar("T")


class FilesReader:
    """Random access to image files: sample i is the i-th of `paths`, with the i-th of `labels` [N]. It may be pickled.

    `where` names all of them.
    """

    def __init__(self, where: str, paths: Sequence[str], labels: NDArray[np.int64]) -> None:
        self.where, self.paths, self.labels = where, paths, labels

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, sample_id: int, decode: Callable[[bytes], T]) -> tuple[T, int]:
        """`decode` of the file's bytes, and its label. BadSample where that fails."""
        try:
            with open(self.paths[sample_id], "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size > MAX_SAMPLE_BYTES:
                    raise ValueError(f"it has {size} bytes, and {MAX_SAMPLE_BYTES} are the most")
                return decode(file.read()), int(self.labels[sample_id])
        except Exception as error:  # a decoder may raise anything
            raise BadSample(self.where, self.key(sample_id), sample_id, "", _reason(error)) from error

    def key(self, sample_id: int) -> str:
        """The file's path."""
        return self.paths[sample_id]


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else "") or str(error)


def read_folders(path: str) -> tuple[FilesReader, tuple[str, ...]]:
    """The images of the class folders in `path` and the folders' names, which labels count, both in sorted order.

    UserError as `ClassFolders`, and for files that are images by their names but cannot be opened: how many samples
    there are must not depend on them.
    """
    found = list(ClassFolders(path, "").scan())
    if refused := [entry for entry in found if isinstance(entry, Rejected)]:
        raise UserError(
            f"{len(refused)} files in {path} are images by their names, but {refused[0].where} is {refused[0].reason}: "
            "mend or remove what is no file"
        )
    entries = sorted(entry for entry in found if isinstance(entry, Entry))
    names = sorted({entry.class_name for entry in entries})
    labels = {name: label for label, name in enumerate(names)}
    paths = [os.path.join(entry.container, entry.name) for entry in entries]
    return FilesReader(path, paths, np.array([labels[entry.class_name] for entry in entries])), tuple(names)
