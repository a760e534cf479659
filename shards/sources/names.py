"""The pass over the names of an archive, kept as a file, so that it is made once."""

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shards.durable import atomic_file
from shards.errors import UserError
from shards.sources.base import Entry, Fetcher, PRule, Rejected, Source

_FORMAT = "names of a shards source, version 1"
_COLUMNS = ("split", "class", "name", "offset", "size")
# Ten times the longest name that a tar may have: a letter has ten at most when it is escaped.
_MAX_LINE_BYTES = 32 << 20
_MAX_HEADER_BYTES = 4096
_COMPRESSION, _GZIP_WBITS = 6, 31


class Archive(Source, Protocol):
    """A source whose entries are all in one file."""

    @property
    def path(self) -> str: ...


@dataclass(frozen=True)
class Named:
    """A source of one archive, with what its scan finds kept in the file `path`, which any later scan is read from.

    The file is text compressed with gzip: a header in JSON; a line a finding, of tab-separated columns with Python's
    escapes (5 of an image, 3 of a file that cannot be one: split, where, reason); and last the number of findings.
    It is made again where the archive's size or time has changed. A directory is scanned every time.
    """

    source: Archive
    path: str

    @property
    def in_order(self) -> bool:
        return self.source.in_order

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self.source.classes

    @property
    def p_rule(self) -> PRule | None:
        return self.source.p_rule

    def fetcher(self) -> Fetcher:
        return self.source.fetcher()

    def scan(self) -> Iterator[Entry | Rejected]:
        """UserError also where `path` is another file than this wrote, or is damaged; memory does not grow with it."""
        if not os.path.isfile(self.source.path):
            return self.source.scan()
        header = _header(self.source)
        return self._read() if _kept_header(self.path) == header else self._write(header)

    def _write(self, header: bytes) -> Iterator[Entry | Rejected]:
        packer = zlib.compressobj(_COMPRESSION, zlib.DEFLATED, _GZIP_WBITS)
        num_findings = 0
        with atomic_file(Path(self.path)) as file:
            file.write(packer.compress(header))
            for finding in self.source.scan():
                file.write(packer.compress(_line(finding)))
                num_findings += 1
                yield finding
            file.write(packer.compress(_end(num_findings)) + packer.flush())

    def _read(self) -> Iterator[Entry | Rejected]:
        container, num_findings = os.path.abspath(self.source.path), 0
        try:
            with gzip.open(self.path) as file:
                file.readline(_MAX_LINE_BYTES)
                while (line := file.readline(_MAX_LINE_BYTES)) and line != _end(num_findings):
                    yield _finding(line, container)
                    num_findings += 1
                if not line or file.read(1):
                    raise ValueError(f"its end is not where it must be, after {num_findings} findings")
        except (OSError, EOFError, zlib.error, ValueError) as error:
            raise _unusable(self.path, f"it is damaged: {error}") from error


def _header(source: Archive) -> bytes:
    """A line that tells this archive and kind of source from others."""
    status = os.stat(source.path)
    header = {
        "archive": {"mtime_ns": status.st_mtime_ns, "size": status.st_size},
        "columns": _COLUMNS,
        "format": _FORMAT,
        "source": type(source).__name__,
        "split": getattr(source, "split", None),
    }
    return json.dumps(header, sort_keys=True).encode() + b"\n"


def _kept_header(path: str) -> bytes:
    """The header of the names file; empty where there is no file. UserError for a file that is none."""
    if not os.path.lexists(path):
        return b""
    try:
        with gzip.open(path) as file:
            header = file.readline(_MAX_HEADER_BYTES)
        found = json.loads(header)
        if not isinstance(found, dict) or found.get("format") != _FORMAT:
            raise ValueError("it does not begin like one")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise _unusable(path, f"it is damaged or something else: {error}") from error
    return header


def _line(finding: Entry | Rejected) -> bytes:
    if isinstance(finding, Rejected):
        return b"\t".join(map(_escape, finding)) + b"\n"
    text = b"\t".join(map(_escape, (finding.split, finding.class_name, finding.name)))
    return b"%s\t%d\t%d\n" % (text, finding.offset, finding.size)


def _finding(line: bytes, container: str) -> Entry | Rejected:
    """The inverse of _line; ValueError where it is no line of a finding."""
    columns = line.rstrip(b"\n").split(b"\t")
    if len(columns) not in (len(_COLUMNS), len(Rejected._fields)):
        raise ValueError(f"{line[:80]!r} is no finding")
    first, second, third = map(_unescape, columns[:3])
    if len(columns) == len(Rejected._fields):
        return Rejected(first, second, third)
    return Entry(first, second, third, container, int(columns[3]), int(columns[4]))


def _escape(text: str) -> bytes:
    """ASCII without tabs and line ends, also of names that are no UTF-8."""
    return text.encode("unicode_escape")


def _unescape(text: bytes) -> str:
    return text.decode("unicode_escape")


def _end(num_findings: int) -> bytes:
    return b"end\t%d\n" % num_findings


def _unusable(path: str, reason: str) -> UserError:
    return UserError(f"cannot use {path!a} as the names file of an archive: {reason}; delete it or give another path")
