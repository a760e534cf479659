"""Where the bytes of shards come from: local disk, or a URL."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import unquote, urlsplit

from shards.cache import CachedStore
from shards.cache_directory import CacheDirectory
from shards.errors import UserError
from shards.files import OpenFiles
from shards.index import Index
from shards.remote import SCHEMES, RangeStore, Remote, Retry, StoreError
from shards.remote_index import fetch_index

__all__ = ["LocalStore", "Store", "StoreError", "StoreOptions", "open_data"]

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)", re.IGNORECASE)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


class Store(Protocol):
    """The shards of one index, by file name. It may be pickled, used after a fork, and read again after `close`."""

    @property
    def fetches_ahead(self) -> bool:
        """Whether `ahead` is of any use."""

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes of a file. OSError where it is missing, shorter, or not what the index says: a bad
        sample. StoreError where the store does not answer."""

    def where(self, name: str) -> str:
        """The file's path or URL, for messages."""

    def ahead(self, names: Iterable[str]) -> None:
        """A hint that these files are read next, in this order, after those of earlier hints. Never raises."""

    def close(self) -> None:
        """Ends what runs in the background, and connections."""


@dataclass(frozen=True)
class StoreOptions:
    """How data at a URL is read; local data is read where it lies.

    `remote`: "cache" keeps whole shards on local disk, "range" reads each sample alone. `cache`: a directory; it gets
    the index in both cases. `cache_size`: most bytes of shards in it, of all datasets together.
    """

    remote: Literal["cache", "range"] = "cache"
    cache: str = "~/.cache/vittm-pipeline"
    cache_size: str = "100GB"

    @property
    def cache_bytes(self) -> int:
        """UserError for a size that is none."""
        match = _SIZE.fullmatch(self.cache_size.strip())
        if match is None:
            raise UserError(f"data.cache-size {self.cache_size!r} is no size: give a number and a unit, such as 100GB")
        return int(float(match[1]) * _UNITS[match[2].upper()])


class LocalStore:
    """A `Store` of shards in a directory."""

    fetches_ahead = False

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files = OpenFiles()

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalStore, (self._root,)

    def read(self, name: str, offset: int, size: int) -> bytes:
        return self._files.read(self._root / name, offset, size)

    def where(self, name: str) -> str:
        return str(self._root / name)

    def ahead(self, names: Iterable[str]) -> None:
        """Does nothing: the system reads ahead by itself."""

    def close(self) -> None:
        self._files.close()


_OPTIONS, _RETRY = StoreOptions(), Retry()


def open_data(location: str, options: StoreOptions = _OPTIONS, retry: Retry = _RETRY) -> tuple[Index, Store]:
    """The index and the store of the shards in a directory, given by its path or URL.

    UserError as for `Index.load`, for a URL of a kind that is not read, a package that is missing for it, an index
    that is not what it should be, and a cache that is too small for a shard. StoreError where the store does not
    answer.
    """
    path = _local_path(location)
    if path is not None:
        index = Index.load(path)
        return index, LocalStore(index.root)
    remote, cache = Remote(location, retry), Path(options.cache).expanduser().absolute()
    if options.remote == "range":
        index = fetch_index(remote, cache)
        return index, RangeStore(remote, index)
    directory = CacheDirectory(cache, options.cache_bytes)
    index = fetch_index(remote, cache)
    _check_bound(index, directory)
    store = CachedStore(remote, index, directory)
    store.forget()
    return index, store


def _local_path(location: str) -> str | None:
    """None for the URL of a remote store; UserError for one that is not read."""
    match = _SCHEME.match(location)
    if match is None or Path(location).exists():
        return location
    scheme, parts = match[1], urlsplit(location)
    if scheme == "file" and parts.netloc in ("", "localhost"):
        return unquote(parts.path)
    if scheme not in SCHEMES or not parts.netloc:
        allowed = ", ".join(f"{name}://" for name in (*SCHEMES, "file"))
        raise UserError(f"data at {location!r} is not read: give a directory's path, or its URL with {allowed}")
    if scheme.startswith("http") and (parts.query or parts.fragment):
        raise UserError(f"the URL {location!r} ends in a query or fragment: give that of the directory of the shards")
    return None


def _check_bound(index: Index, directory: CacheDirectory) -> None:
    for shard in (shard for split in index.splits for shard in split.shards):
        if shard.num_bytes > directory.bound:
            raise UserError(
                f"the shard {shard.name} has {shard.num_bytes:,} bytes, and data.cache-size allows {directory.bound:,} "
                f"in {directory.root}: raise it, best to some hundred shards, or give data.remote range"
            )
