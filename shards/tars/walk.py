"""Reading tars that anybody wrote: v7, ustar, GNU and pax headers, from front to back, without their contents.

Formats: POSIX.1-2017 (`pax`) and https://www.gnu.org/software/tar/manual/html_node/Standard.html.
"""

import gzip
import os
import sys
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from shards.errors import UserError
from shards.tars.ustar import BLOCK

# What is read at once of an extended header, or behind the end mark (GNU tar fills up a record there, mostly 10 KiB).
_MAX_EXTRA_BYTES = 1 << 20
_ADLER_BASE = 65521
_LONG_NAME, _LONG_LINK, _PAX, _PAX_SUN, _PAX_SHARED, _SPARSE = b"LKxXgS"
_EXTENDED = frozenset((_LONG_NAME, _LONG_LINK, _PAX, _PAX_SUN, _PAX_SHARED))
_BODILESS = frozenset(b"123456")  # no content follows, whatever size they state
_KINDS = {**dict.fromkeys(b"\x0007", "file"), **dict.fromkeys(b"12", "link"), ord("5"): "directory"}


class Member(NamedTuple):
    """A member: `size` bytes of content at `offset` of the file; `name` is decoded as UTF-8 with surrogateescape.

    `kind` is "file", "directory", "link" (symbolic or hard) or "other" (devices, pipes, sparse files, volume labels).
    """

    name: str
    offset: int
    size: int
    kind: str


def walk(file: BinaryIO, end: int | None = None) -> Iterator[Member]:
    """The members of the tar that begins at `file.tell()`; `end` bounds a tar that is the member of another.

    `file` is only ever sought forward, so it may be a `gzip.GzipFile`; open a plain file with `buffering=0`, as a
    buffer would be filled once a header. Before it goes on, the caller may read the member's content or walk it, with
    `end` = offset + size. UserError for a file that is no tar, is damaged or stops early; sizes that headers claim are
    checked before they are read.
    """
    tar = _Tar(file, end)
    while member := tar.next():
        yield member


def unsafe_path(name: str) -> str:
    """Why a member's name must not become a path; "" where it may."""
    if name.startswith("/"):
        return "an absolute path"
    if ".." in name.split("/"):
        return "'..' in its path"
    return "a NUL in its name" if "\0" in name else ""


class _Tar:
    """Where the next header lies, and what extended headers said of the next member and of all that follow."""

    def __init__(self, file: BinaryIO, end: int | None) -> None:
        self._file = file
        self._start = self._position = file.tell()
        self._end = _file_end(file) if end is None else end
        self._own: dict[bytes, bytes] = {}
        self._shared: dict[bytes, bytes] = {}

    def next(self) -> Member | None:
        """The next member; None at the end of the tar."""
        while header := self._header():
            try:
                member = self._parse(header)
            except ValueError as error:
                raise self._error(f"expected a sound header: {error}") from error
            if member:
                return member
        return None

    def _header(self) -> bytes:
        """The header block at the current position; empty at the end of the tar."""
        left = self._end - self._position
        if left < 0:
            raise self._error(f"expected {-left} more bytes of padding")
        header = self._read(self._position, min(BLOCK, left))
        if _is_header(header):
            return header
        self._check_end(header)
        return b""

    def _parse(self, header: bytes) -> Member | None:
        """The header's member, None for an extended header; moves on behind it. ValueError says what is wrong."""
        flag, size, content = header[156], _number(header[124:136]), self._position + BLOCK
        if flag in _EXTENDED:
            self._extend(flag, self._extension(content, size))
            member = None
        else:
            if flag == _SPARSE:
                content = self._after_sparse_map(header, content)
            member = self._member(header, content, size)
            size = member.size
        if content + size > self._end:
            name = f"member {member.name!a}" if member else "an extended header"
            raise ValueError(f"{name} claims {size} bytes, and {self._end - content} are left")
        self._position = content + (size + BLOCK - 1) // BLOCK * BLOCK
        return member

    def _member(self, header: bytes, content: int, size: int) -> Member:
        flag, name = header[156], header[:100].partition(b"\0")[0]
        kind = _KINDS.get(flag, "other")
        if header[345] and header[257:263] == b"ustar\0":  # GNU's magic differs, and it keeps times there
            name = header[345:500].partition(b"\0")[0] + b"/" + name
        if self._own or self._shared:
            fields = {**self._shared, **self._own}
            self._own = {}
            name = fields.get(b"GNU.sparse.name") or fields.get(b"path") or name
            size = _decimal(fields[b"size"]) if fields.get(b"size") else size
            kind = "other" if b"sparse" in fields else kind
        if kind == "directory" or (flag == 0 and name.endswith(b"/")):  # v7 had no flag for directories
            name, kind, size = name.rstrip(b"/"), "directory", 0
        return Member(name.decode("utf-8", "surrogateescape"), content, 0 if flag in _BODILESS else size, kind)

    def _extension(self, content: int, size: int) -> bytes:
        if size > _MAX_EXTRA_BYTES:
            raise ValueError(f"an extended header claims {size} bytes, more than {_MAX_EXTRA_BYTES}")
        data = self._read(content, size)
        if len(data) < size:
            raise ValueError(f"an extended header claims {size} bytes, and {len(data)} are left")
        return data

    def _extend(self, flag: int, data: bytes) -> None:
        if flag == _LONG_NAME:
            self._own[b"path"] = data.partition(b"\0")[0]
        elif flag != _LONG_LINK:
            (self._shared if flag == _PAX_SHARED else self._own).update(_pax_fields(data))

    def _after_sparse_map(self, header: bytes, content: int) -> int:
        """Where the content begins behind the blocks that continue an old GNU sparse map."""
        more = header[482]
        while more:
            block = self._read(content, BLOCK)
            if len(block) < BLOCK:
                raise ValueError("the file ends in the map of a sparse file")
            content, more = content + BLOCK, block[504]
        return content

    def _check_end(self, header: bytes) -> None:
        """UserError unless the tar ends here, with two blocks of zeros or with its file."""
        if len(header) % BLOCK:
            raise self._error(f"expected a header, but only {len(header)} bytes are left")
        if header.strip(b"\0"):
            raise self._error("expected a header, but the checksum is wrong")
        if self._own or (self._position == self._start and not header):
            raise self._error("expected a member, but there is none")
        if not header:
            return
        # To the end also because only there gzip compares its checksum.
        left = self._end - self._position - BLOCK
        tail = self._read(self._position + BLOCK, min(_MAX_EXTRA_BYTES + 1, left))
        if len(tail) > _MAX_EXTRA_BYTES:
            raise self._error(f"expected the end behind its end mark, but over {_MAX_EXTRA_BYTES} bytes follow")
        blocks = [tail[at : at + BLOCK] for at in range(0, len(tail), BLOCK)]
        if any(map(_is_header, blocks)) or tail[:BLOCK].strip(b"\0"):
            raise self._error("expected the end behind a block of zeros, but more follows")

    def _read(self, position: int, count: int) -> bytes:
        """Bytes [position, position + count), fewer at the end of the file."""
        try:
            reached = self._file.seek(position)
            data = self._file.read(count) if reached == position else b""
            while 0 < len(data) < count and (more := self._file.read(count - len(data))):
                data += more
        except (OSError, EOFError, zlib.error) as error:
            raise self._error(f"cannot read on: {error}") from error
        if reached != position:
            raise self._error(f"expected a header, but the file ends at byte {reached}")
        return data

    def _error(self, what: str) -> UserError:
        where = f"byte {self._position}" + " of its contents" * isinstance(self._file, gzip.GzipFile)
        name = getattr(self._file, "name", "") or "the tar"
        return UserError(f"{name!a} is no tar or damaged at {where}: {what}; copy or download it again")


def _file_end(file: BinaryIO) -> int:
    """The size of a plain file; of a compressed one only reading it would tell."""
    if isinstance(file, gzip.GzipFile):
        return sys.maxsize
    position = file.tell()
    end = file.seek(0, os.SEEK_END)
    file.seek(position)
    return end


def _is_header(block: bytes) -> bool:
    """Whether the checksum of a block [512] is the sum of its bytes, with eight spaces in the checksum's place."""
    if len(block) < BLOCK:
        return False
    try:
        stated = _number(block[148:156]) - 8 * ord(" ")
    except ValueError:
        return False
    # The low half of Adler-32 is 1 + the sum of the bytes, modulo 65521: seven times faster than sum().
    found = zlib.adler32(block[156:], zlib.adler32(block[:148])) & 0xFFFF
    return (stated + 1 - found) % _ADLER_BASE == 0 or stated == _signed_sum(block[:148] + block[156:])


def _signed_sum(data: bytes) -> int:
    """The checksum of tars that old Unices wrote, whose bytes were signed."""
    return sum(byte - 256 if byte > 127 else byte for byte in data)


def _number(field: bytes) -> int:
    """A number of a header: octal digits, or GNU's base 256 where the first bit is set. ValueError for others."""
    if field[0] & 0x80:
        number = int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    else:
        number = int(field.partition(b"\0")[0].strip() or b"0", 8)
    if number < 0:
        raise ValueError(f"{field!r} is no number of bytes")
    return number


def _decimal(value: bytes) -> int:
    if not value.isdigit():
        raise ValueError(f"{value[:40]!r} is no number of bytes")
    return int(value)


def _pax_fields(data: bytes) -> dict[bytes, bytes]:
    """What matters of the records `<length> <key>=<value>\\n` of a pax header. ValueError where it is malformed."""
    fields, start = {}, 0
    while start < len(data) and data[start]:
        length, _, _ = data[start : start + 20].partition(b" ")
        end = start + _decimal(length)
        record = data[start + len(length) + 1 : end]
        key, equals, value = record[:-1].partition(b"=")
        if not equals or record[-1:] != b"\n" or end > len(data):
            raise ValueError(f"{data[start : start + 40]!r} is no record of a pax header")
        if key in (b"path", b"size", b"GNU.sparse.name"):
            fields[key] = value
        if key.startswith(b"GNU.sparse."):
            fields[b"sparse"] = b"1"
        start = end
    return fields
