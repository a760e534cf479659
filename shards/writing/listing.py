"""The images of a split as a table on disk, in an order that only their classes and names decide."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.durable import atomic_file

ROW = np.dtype(
    [
        ("container", "<u4"),  # position in `containers`
        ("label", "<u4"),
        ("offset", "<u8"),
        ("size", "<u4"),
        ("name_bytes", "<u2"),
        ("name", "<u8"),  # where the name begins in the names file
    ]
)
_ROWS, _NAMES, _HEAD = "listing.rows", "listing.names", "listing.json"


class Image(NamedTuple):
    """A row of the table: see `shards.sources.base.Entry`."""

    label: int
    name: str
    container: str
    offset: int
    size: int


class Table:
    """Rows and names being written to files of an existing directory, which stay closed meanwhile."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._num_name_bytes = 0
        for name in (_ROWS, _NAMES):
            (directory / name).write_bytes(b"")

    def append(self, rows: NDArray[np.void], names: Sequence[bytes]) -> None:
        """Rows of ROW, whose `name` and `name_bytes` are set here."""
        lengths = np.fromiter(map(len, names), np.uint64, len(names))
        rows["name_bytes"] = lengths
        rows["name"] = self._num_name_bytes + np.cumsum(lengths) - lengths
        self._num_name_bytes += int(lengths.sum())
        with open(self._directory / _ROWS, "ab") as file:
            file.write(rows.tobytes())
        with open(self._directory / _NAMES, "ab") as file:
            file.writelines(names)


def read_rows(directory: Path) -> NDArray[np.void]:
    """The rows of a Table, memory-mapped."""
    return _mapped(directory / _ROWS, ROW)


def read_names(directory: Path) -> NDArray[np.uint8]:
    """The names of a Table, one after the other, memory-mapped."""
    return _mapped(directory / _NAMES, np.dtype(np.uint8))


def _mapped(path: Path, dtype: np.dtype) -> NDArray:
    # As plain arrays: np.memmap has a Python method run at every item.
    return np.memmap(path, dtype, "r").view(np.ndarray) if path.stat().st_size else np.empty(0, dtype)


class Listing:
    """A split's images, sorted by class and name: the same for the same images, whatever they came in."""

    def __init__(self, directory: Path) -> None:
        head = json.loads((directory / _HEAD).read_bytes())
        self.classes: tuple[str, ...] = tuple(head["classes"])
        self.containers: list[str] = head["containers"]
        self.sha256: str = head["sha256"]
        self.rows = read_rows(directory)
        self._names = read_names(directory)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Image:
        row = self.rows[position]
        start = int(row["name"])
        name = self._names[start : start + int(row["name_bytes"])].tobytes().decode()
        container = self.containers[row["container"]]
        return Image(int(row["label"]), name, container, int(row["offset"]), int(row["size"]))


def write_head(directory: Path, classes: Sequence[str], containers: Sequence[str], sha256: str) -> None:
    """Completes a listing, whose table is written."""
    head = {"classes": list(classes), "containers": list(containers), "sha256": sha256}
    with atomic_file(directory / _HEAD) as file:
        file.write(json.dumps(head).encode())
