"""The index of remote data, fetched to local disk: the manifest at every start, offsets when they changed."""

import hashlib
import io
import os
import re
import shutil
from pathlib import Path

import numpy as np

from shards.download import CHUNK_BYTES, Downloader, is_at, locked, open_part
from shards.durable import atomic_file
from shards.errors import UserError
from shards.files import has_sha256
from shards.index import MANIFEST, OFFSETS_DTYPE, Index, Shard, Split
from shards.remote import Remote

_MAX_MANIFEST_BYTES = 256 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


def fetch_index(remote: Remote, cache: Path, chunk: int = CHUNK_BYTES) -> Index:
    """The index of the data at a URL, its root `<cache>/<URL's hash>/<manifest's hash>`, its shards not there.

    A manifest that changes at its URL thus gets a root of its own, and processes that read by the former are not
    disturbed. UserError where a file is missing, malformed or not what the manifest says, StoreError as for `Remote`.
    """
    manifest = _fetch_manifest(remote)
    root = cache / _digest(remote.url.encode()) / _digest(manifest)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot use the cache directory: {error}; give another data.cache") from error
    with atomic_file(root / MANIFEST) as file:
        file.write(manifest)
    try:
        index = Index.read(root)
        for split in index.splits:
            _check(split)
    except UserError as error:
        shutil.rmtree(root, ignore_errors=True)
        raise UserError(f"the index of {remote.where('')} cannot be used: {error}") from error
    downloader = Downloader(remote, lambda _: False, f"Make room in {cache}, or give another data.cache.", chunk)
    for split in index.splits:
        _fetch_offsets(downloader, root, split)
        index.offsets(split.name)  # that they are rows, and as many as the manifest says
    return index


def _fetch_manifest(remote: Remote) -> bytes:
    try:
        manifest = remote.start(MANIFEST, _MAX_MANIFEST_BYTES)
    except FileNotFoundError as error:
        raise UserError(
            f"there is no {remote.where(MANIFEST)}: check the address, which is that of the directory of the shards; "
            "tars that others wrote are indexed where they lie by `make_shards.py index DIR`"
        ) from error
    if len(manifest) == _MAX_MANIFEST_BYTES:
        raise UserError(f"{remote.where(MANIFEST)} has {_MAX_MANIFEST_BYTES:,} bytes or more, as no index has")
    return manifest


def _check(split: Split) -> None:
    """Raises UserError for what would become a file name or a size; `Index` checks the rest."""
    files = [_offsets_file(split), *split.shards]
    for file in files:
        sizes = (file.num_samples, file.num_bytes)
        if not all(type(size) is int and 0 <= size < 1 << 62 for size in sizes):
            raise UserError(f"{file.name!r} has {file.num_samples!r} samples and {file.num_bytes!r} bytes")
        if not (isinstance(file.sha256, str) and _SHA256.fullmatch(file.sha256)):
            raise UserError(f"{file.name!r} has {file.sha256!r}, which is no sha256")
        if file.name in ("", ".", "..") or not file.name.isprintable():
            raise UserError(f"{file.name!r} is no file name")


def _fetch_offsets(downloader: Downloader, root: Path, split: Split) -> None:
    """The offsets' file, once for all processes that ask for it."""
    file, path = _offsets_file(split), root / split.offsets_name
    part = path.with_name(f"{path.name}.part")
    while not has_sha256(path, file.sha256):
        with locked(open_part(part)) as descriptor:
            if not is_at(descriptor, part):  # renamed by who had the lock before
                continue
            try:
                downloader.fill(descriptor, file)
            except OSError as error:
                part.unlink()
                raise UserError(f"{error}. The data is being rewritten, or is not whole: copy it again.") from error
            os.rename(part, path)


def _offsets_file(split: Split) -> Shard:
    head = {"descr": np.lib.format.dtype_to_descr(OFFSETS_DTYPE), "fortran_order": False, "shape": (split.num_samples,)}
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, head)
    num_bytes = len(header.getvalue()) + split.num_samples * OFFSETS_DTYPE.itemsize
    return Shard(split.offsets_name, split.num_samples, num_bytes, split.offsets_sha256)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
