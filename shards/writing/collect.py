"""What a source finds, put on disk as it comes, and had back class by class."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.sources.base import MAX_IMAGE_BYTES, Entry, Rejected, Source, sample_key
from shards.tars import ustar
from shards.writing.listing import ROW, Table, read_names, read_rows

_MAX_KEY_BYTES = ustar.MAX_NAME_BYTES - len(".json")
_MAX_REJECTED = 100_000
_ROWS_A_WRITE = 1 << 13


class Found:
    """The images of a split, class by class. Memory: some 16 bytes an image."""

    def __init__(self, directory: Path, class_names: Sequence[str]) -> None:
        self._rows, self._names = read_rows(directory), read_names(directory)
        counts = np.bincount(self._rows["label"], minlength=len(class_names))
        ends = np.cumsum(counts)
        self._order = np.argsort(self._rows["label"], kind="stable")
        self._slices = {
            name: slice(int(end - count), int(end))
            for name, count, end in zip(class_names, counts, ends, strict=True)
            if count
        }

    @property
    def counts(self) -> dict[str, int]:
        """The number of images of each class that has some."""
        return {name: where.stop - where.start for name, where in self._slices.items()}

    def of_class(self, name: str) -> tuple[NDArray[np.void], list[bytes]]:
        """A class's rows and names, sorted by name; equal names in the order of the scan."""
        rows = self._rows[self._order[self._slices.get(name, slice(0, 0))]]
        names = [self._names[start : start + size].tobytes() for start, size in rows[["name", "name_bytes"]].tolist()]
        by_name = sorted(range(len(names)), key=names.__getitem__)
        return rows[by_name], [names[i] for i in by_name]


class Collector:
    """Puts the findings of a scan into a directory."""

    def __init__(self, directory: Path, seen: Callable[[], None]) -> None:
        self._directory, self._seen = directory, seen
        self._class_ids: dict[str, int] = {}
        self._container_ids: dict[str, int] = {}
        self._pending: dict[str, tuple[list[tuple[int, ...]], list[bytes]]] = {}
        self._tables: dict[str, Table] = {}
        self.rejected: list[Rejected] = []

    @property
    def containers(self) -> list[str]:
        return list(self._container_ids)

    def collect(self, source: Source) -> dict[str, Found]:
        """Scans the source to its end; what it found by split. UserError where far too much of it cannot be samples."""
        for finding in source.scan():
            if isinstance(finding, Entry):
                self._add(finding)
            else:
                self._reject(finding)
        for split in self._pending:
            self._flush(split)
        return {split: Found(self._directory / split, list(self._class_ids)) for split in self._tables}

    def _add(self, entry: Entry) -> None:
        self._seen()
        if reason := _unfit(entry):
            self._reject(Rejected(entry.split, ascii(f"{entry.class_name}/{entry.name}"), reason))
            return
        rows, names = self._pending.setdefault(entry.split, ([], []))
        container = self._container_ids.setdefault(entry.container, len(self._container_ids))
        label = self._class_ids.setdefault(entry.class_name, len(self._class_ids))
        rows.append((container, label, entry.offset, entry.size, 0, 0))
        names.append(entry.name.encode())
        if len(rows) == _ROWS_A_WRITE:
            self._flush(entry.split)

    def _flush(self, split: str) -> None:
        if split not in self._tables:
            (self._directory / split).mkdir()
            self._tables[split] = Table(self._directory / split)
        rows, names = self._pending[split]
        self._tables[split].append(np.array(rows, ROW), names)
        self._pending[split] = ([], [])

    def _reject(self, rejected: Rejected) -> None:
        if len(self.rejected) == _MAX_REJECTED:
            raise UserError(
                f"more than {_MAX_REJECTED} files of the source cannot be samples, the last one {rejected.where} "
                f"({rejected.reason}); is it a source of this kind?"
            )
        self.rejected.append(rejected)


def _unfit(entry: Entry) -> str:
    """Why an entry cannot be a sample; "" where it can."""
    key = sample_key(entry.class_name, entry.name)
    if not re.fullmatch(r"[^./\0-\x1f\x7f]+", key):
        return f"a dot, a slash or a control character in its key {key!a}"
    try:
        num_bytes = len(key.encode())
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    if num_bytes > _MAX_KEY_BYTES:
        return f"its key has {num_bytes} bytes, more than {_MAX_KEY_BYTES}"
    return f"it has {entry.size} bytes, more than {MAX_IMAGE_BYTES}" if entry.size > MAX_IMAGE_BYTES else ""
