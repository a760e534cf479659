"""Tars of class folders and tars of one tar a class (ILSVRC2012_img_train.tar), compressed with gzip or not."""

import gzip
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple, cast

from shards.errors import UserError
from shards.sources.base import MAX_IMAGE_BYTES, Entry, Fetcher, Rejected, is_image_name
from shards.sources.fetch import Ranges
from shards.tars.walk import Member, unsafe_path, walk

_GZIP = b"\x1f\x8b"
_OTHER_COMPRESSIONS = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class TarOfImages:
    """The images of a tar: the folder that an image lies in is its class, or the tar inside the tar, by its stem.

    Names that begin with a dot and files that are no images by their suffix are passed over. An image's offset is that
    of its bytes in the tar, unpacked where it is compressed.
    """

    path: str
    split: str
    classes: tuple[str, ...] | None = None

    p_rule = None

    @property
    def in_order(self) -> bool:
        return is_gzip(self.path)

    def scan(self) -> Iterator[Entry | Rejected]:
        """UserError for a missing or damaged archive; memory does not grow with it."""
        for image in images(self.path):
            yield image.finding(self.path, self.split)

    def fetcher(self) -> Fetcher:
        return GzipRanges() if self.in_order else Ranges()


class TarImage(NamedTuple):
    """An image in a tar: the names of the folders above it and its own; `reason` says why it cannot be a sample.

    A tar inside the tar counts as a folder, named by its stem.
    """

    parts: tuple[str, ...]
    offset: int
    size: int
    reason: str

    def finding(self, path: str, split: str) -> Entry | Rejected:
        """The entry of the image in the archive `path`, with the folder that it lies in as its class."""
        if not self.reason and len(self.parts) > 1:
            return Entry(split, self.parts[-2], self.parts[-1], os.path.abspath(path), self.offset, self.size)
        return Rejected(split, ascii("/".join((path, *self.parts))), self.reason or "it lies in no class folder")


def images(path: str) -> Iterator[TarImage]:
    """The images of a tar and of the tars in it, front to back, and what cannot be one.

    UserError for a missing or damaged archive.
    """
    with open_tar(path) as file:
        yield from _images(file, None, ())


def open_tar(path: str) -> BinaryIO:
    """The tar's bytes, unpacked as they are read where gzip compressed them; UserError where it cannot be opened."""
    return cast(BinaryIO, gzip.open(path)) if is_gzip(path) else open(path, "rb", buffering=0)


def is_gzip(path: str) -> bool:
    """By its first bytes; UserError where it is no readable file, or of another compression."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"the archive {path!a} is no regular file; give the tar itself")
        with open(path, "rb", buffering=0) as file:
            magic = file.read(8)
    except OSError as error:
        raise UserError(f"cannot read the archive {path!a}: {error.strerror}; check the path") from error
    for start, name in _OTHER_COMPRESSIONS.items():
        if magic.startswith(start):
            raise UserError(f"{path!a} is compressed with {name}, and only gzip is read; decompress it first")
    return magic.startswith(_GZIP)


class GzipRanges:
    """Containers are files compressed with gzip, and every entry a range of what one unpacks to, read front to back."""

    def __init__(self) -> None:
        self._container = ""
        self._file: gzip.GzipFile | None = None

    def __call__(self, container: str, name: str, offset: int, size: int) -> bytes:
        file = self._open(container)
        if offset < file.tell():
            raise ValueError(f"byte {offset} lies before byte {file.tell()}, and gzip is read front to back")
        try:
            file.seek(offset)
            data = file.read(size)
        except (EOFError, zlib.error) as error:
            raise OSError(f"the archive is damaged: {error}") from error
        if len(data) < size:
            raise OSError(f"the archive ends after {len(data)} of {size} bytes at offset {offset}")
        return data

    def _open(self, container: str) -> gzip.GzipFile:
        if self._file is None or self._container != container:
            self.close()
            self._container = container
            self._file = gzip.GzipFile(container)
        return self._file

    def close(self) -> None:
        if self._file:
            self._file.close()

    def __del__(self) -> None:
        self.close()


def _images(file: BinaryIO, end: int | None, above: tuple[str, ...]) -> Iterator[TarImage]:
    for member in walk(file, end):
        if member.kind == "directory":
            continue
        parts = *above, *(part for part in member.name.split("/") if part not in ("", "."))
        suffix = os.path.splitext(member.name)[1].lower()
        if reason := _unfit(member, suffix, nested=bool(above)):
            yield TarImage(parts, member.offset, member.size, reason)
        elif any(part.startswith(".") for part in parts):
            continue
        elif suffix == ".tar":
            yield from _images(file, member.offset + member.size, (*parts[:-1], os.path.splitext(parts[-1])[0]))
        elif is_image_name(member.name):
            yield TarImage(parts, member.offset, member.size, "")


def _unfit(member: Member, suffix: str, nested: bool) -> str:
    """Why a member can hold no sample; "" where it may, or where nobody would look for one in it."""
    if reason := unsafe_path(member.name):
        return reason
    if member.kind == "link":
        return "a link"
    if member.kind != "file":
        return "neither a file nor a folder, but a device, a pipe or a sparse file"
    if suffix == ".tar" and nested:
        return "a tar in a tar in a tar"
    if member.name.lower().endswith((".tar.gz", ".tgz")):
        return "a compressed tar in a tar"
    if is_image_name(member.name) and member.size > MAX_IMAGE_BYTES:
        return f"it has {member.size} bytes, more than {MAX_IMAGE_BYTES}"
    return ""
