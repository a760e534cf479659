"""The inside of parquet files of images, read without threads and in bounded memory.

An image's offset is its row group << 32 | its row in that group. A page cannot be read alone, so in random order every
image costs the decoding of its group, on the hub 12 MB: 3 ms; in order it is a hundredth of that.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from shards.errors import UserError

_IMAGE, _PATH, _LABEL = "image.bytes", "image.path", "label"
_TYPES = ("struct<bytes: binary, path: string>", "struct<path: string, bytes: binary>")
_ROW_BITS = 32
# What a process keeps of row groups, and so the most that one may have; on the hub they have 12 MB.
_MAX_GROUP_BYTES = 256 << 20
_SCAN_ROWS, _FETCH_ROWS, _READ_BYTES = 256, 16, 1 << 20
_REWRITE = (
    "import sys, pyarrow.parquet as p; f = p.ParquetFile(sys.argv[1], pre_buffer=False, buffer_size=1 << 20); "
    "w = p.ParquetWriter(sys.argv[2], f.schema_arrow); [w.write_batch(b) for b in f.iter_batches(100)]; w.close()"
)


def read_rows(path: str) -> Iterator[tuple[int, int | None, bytes | None]]:
    """Offset, label and name of every image of a file."""
    with readable(path) as file:
        for group in range(file.num_row_groups):
            _check_group(path, group, _column_bytes(file, group)[_IMAGE])
            rows = _rows_a_batch(file, group, _PATH, _SCAN_ROWS)
            offset = group << _ROW_BITS
            for batch in file.iter_batches(rows, [group], [_PATH, _LABEL], use_threads=False):
                names = batch.column("image").field("path").cast("binary").to_pylist()
                yield from zip(count(offset), batch.column("label").to_pylist(), names, strict=False)
                offset += batch.num_rows


def label_names(path: str) -> tuple[str, ...] | None:
    """The ClassLabel names in the schema's metadata."""
    with readable(path) as file:
        text = (file.schema_arrow.metadata or {}).get(b"huggingface")
    try:
        names = json.loads(text)["info"]["features"]["label"].get("names") if text else None
        if not names:
            return None
        if len({name.encode() for name in names}) < len(names):
            raise ValueError("two labels have one name")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"the label names in the 'huggingface' metadata of {path!a} are malformed ({error!r}); download it again"
        ) from error
    return tuple(names)


@contextmanager
def readable(path: str) -> Iterator[Any]:
    """The open file, checked for its columns; UserError where it or what is read of it is damaged."""
    pa, parquet = _pyarrow()
    try:
        with _opened(parquet, path) as file:
            _check_columns(path, file.schema_arrow)
            yield file
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path!a} is no parquet file, or a damaged one ({error}); download it again") from error


class RowGroups:
    """A fetcher that keeps the row groups it read last, as long as they have 256 MiB together."""

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._num_bytes = 0

    def __call__(self, container: str, name: str, offset: int, size: int) -> bytes:
        group, row = divmod(offset, 1 << _ROW_BITS)
        try:
            data = self._images(container, group)[row]["bytes"].as_py()
        except IndexError as error:
            raise ValueError(f"the parquet file has no row {row} of row group {group} any more") from error
        if data is None:
            raise ValueError("the parquet file has no bytes of it, at most a path")
        return data

    def _images(self, path: str, group: int) -> Any:
        """The image column of a row group, a pyarrow.ChunkedArray."""
        if (path, group) not in self._groups:
            column = _read_group(path, group)
            self._num_bytes += column.nbytes
            while self._num_bytes > _MAX_GROUP_BYTES:
                self._num_bytes -= self._groups.popitem(last=False)[1].nbytes
            self._groups[path, group] = column
        self._groups.move_to_end((path, group))
        return self._groups[path, group]


def _read_group(path: str, group: int) -> Any:
    """The image column of a row group; ValueError or OSError where it cannot be had, in bounded memory."""
    pa, parquet = _pyarrow()
    try:
        with _opened(parquet, path) as file:
            rows = _rows_a_batch(file, group, _IMAGE, _FETCH_ROWS)
            batches, num_bytes = [], 0
            for batch in file.iter_batches(rows, row_groups=[group], columns=[_IMAGE], use_threads=False):
                batches.append(batch)
                num_bytes += batch.nbytes
                if num_bytes > _MAX_GROUP_BYTES:
                    raise ValueError(f"row group {group} unpacks to more than {_MAX_GROUP_BYTES} bytes")
            return pa.Table.from_batches(batches).column("image")
    except pa.ArrowException as error:
        raise ValueError(f"row group {group} is damaged: {error}") from error


def _check_columns(path: str, schema: Any) -> None:
    types = {field.name: re.sub("large_| not null", "", str(field.type)) for field in schema}
    if types.get("image") not in _TYPES or not re.match("u?int", types.get("label", "")):
        raise UserError(
            f"{path!a} must have the columns image: {_TYPES[0]} and label: int64; it has "
            f"{', '.join(f'{name!a}: {kind}' for name, kind in types.items())}. Rename or cast them, for example with "
            "datasets' Image and ClassLabel"
        )


def _check_group(path: str, group: int, num_bytes: int) -> None:
    if num_bytes > _MAX_GROUP_BYTES:
        raise UserError(
            f"row group {group} of {path!a} has {num_bytes} bytes of images and may have {_MAX_GROUP_BYTES}: in place "
            f"an image costs its whole group. Write the file again in groups of 100: python -c '{_REWRITE}' OLD NEW"
        )


def _rows_a_batch(file: Any, group: int, column: str, most: int) -> int:
    """As few rows as stay within memory even if all repeat one value (a dictionary) that fills the column."""
    return min(most, max(1, _MAX_GROUP_BYTES // max(1, _column_bytes(file, group)[column])))


def _column_bytes(file: Any, group: int) -> dict[str, int]:
    """What the leaf columns of a row group take, packed or unpacked, whichever is more."""
    metadata = file.metadata.row_group(group)
    columns = [metadata.column(number) for number in range(metadata.num_columns)]
    return {one.path_in_schema: max(one.total_compressed_size, one.total_uncompressed_size) for one in columns}


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("parquet is read by pyarrow, which is missing: pip install 'vittm-pipeline[data]'") from error
    return pyarrow, pyarrow.parquet


def _opened(parquet: Any, path: str) -> Any:
    """A pyarrow.parquet.ParquetFile, which closes as a context manager and starts no threads."""
    return parquet.ParquetFile(path, pre_buffer=False, buffer_size=_READ_BYTES)
