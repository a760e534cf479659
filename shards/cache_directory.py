"""A directory of cached shards that never holds more bytes than its bound, whoever writes to it at the same time.

<root>/.lock                                held while files are listed, made, renamed or removed
<root>/<dataset>/<sha256>-<bytes>-<name>    a whole shard; its access time is 0 while it waits for its first reader
<root>/<dataset>/part-<the same>            locked by the process that downloads it, a remainder where none does
<root>/<dataset>/wrong-<the same>           why the store's shard cannot be had
"""

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shards.download import locked, open_part
from shards.remote import StoreError

REMEMBERED_SECONDS = 600  # a shard that cannot be had is asked for again after so long
_WAITING_SECONDS = 3600  # a shard fetched ahead that nobody read for so long is as good as any other
_NAME = re.compile(r"(part-|wrong-|)[0-9a-f]{16}-(\d+)-")
_MAX_NAME_BYTES = 150


@dataclass(frozen=True)
class _File:
    path: str
    num_bytes: int  # that it has, or will have
    touched: float
    waits: bool  # fetched ahead or being fetched, not read yet

    @property
    def worth(self) -> tuple[bool, float]:
        """What is worth least goes first: the least recently used, before what is still to be read."""
        return self.waits, self.touched


@dataclass(frozen=True)
class CacheDirectory:
    """`bound`: bytes of all shards below `root`, those being downloaded counted whole."""

    root: Path
    bound: int

    @property
    def remedy(self) -> str:
        return (
            f"The shard cache {self.root} may hold {self.bound:,} bytes: make room on its disk, lower data.cache-size, "
            "or give a data.cache on another disk. What is there is kept."
        )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process (and thread) at a time; StoreError where the directory cannot be written."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StoreError(f"cannot use the cache directory: {error}. {self.remedy}") from error
        with locked(descriptor):
            yield

    def claim(self, part: Path, num_bytes: int, ahead: bool) -> int | None:
        """A descriptor of a part, made where it is missing and room can be made; None where it cannot."""
        with self.locked():
            try:
                part.parent.mkdir(exist_ok=True)
                if not part.exists() and not self._make_room(num_bytes, ahead):
                    return None
                return open_part(part)
            except OSError as error:
                raise StoreError(f"cannot write to the shard cache: {error}. {self.remedy}") from error

    def free(self, num_bytes: int) -> bool:
        """Removes files worth least, of `num_bytes` in all, whatever the bound; False where none could be."""
        with self.locked():
            return self._remove(self._files(), num_bytes) > 0

    def _make_room(self, num_bytes: int, ahead: bool) -> bool:
        """Removes what is worth least and not in use until `num_bytes` more fit; False where they cannot.

        For a shard fetched `ahead`, none that waits for its reader is removed, and these fill half the cache at most.
        """
        files = self._files()
        waiting = sum(file.num_bytes for file in files if file.waits)
        if ahead and waiting and waiting + num_bytes > self.bound // 2:
            return False
        excess = sum(file.num_bytes for file in files) + num_bytes - self.bound
        return self._remove([file for file in files if not (ahead and file.waits)], excess) >= excess

    def _files(self) -> list[_File]:
        now = time.time()
        return [file for dataset in self.root.iterdir() if dataset.is_dir() for file in _shards(dataset, now)]

    def _remove(self, files: list[_File], num_bytes: int) -> int:
        """How many bytes were freed."""
        freed = 0
        for file in sorted(files, key=lambda file: file.worth):
            if freed >= num_bytes:
                break
            if _remove_unused(file.path):
                freed += file.num_bytes
        return freed


def cached_name(sha256: str, num_bytes: int, name: str) -> str:
    """Unique by hash and size; the shard's name is for people, and cut where file systems would not take it."""
    return f"{sha256[:16]}-{num_bytes}-{name.encode()[-_MAX_NAME_BYTES:].decode(errors='ignore')}"


def _shards(dataset: Path, now: float) -> Iterator[_File]:
    for entry in os.scandir(dataset):
        match = _NAME.match(entry.name)
        try:
            state = entry.stat(follow_symlinks=False)
        except FileNotFoundError:  # a remainder that its owner removed
            continue
        if match is None:
            continue
        if match[1] == "wrong-":
            if abs(now - state.st_mtime) > REMEMBERED_SECONDS:  # also where the clock has gone back since
                Path(entry.path).unlink(missing_ok=True)
            continue
        unread = match[1] == "part-" or state.st_atime == 0
        waits = unread and abs(now - state.st_mtime) < _WAITING_SECONDS
        yield _File(entry.path, int(match[2]), state.st_mtime, waits)


def _remove_unused(path: str) -> bool:
    """Whether the file is gone now: nobody reads or writes it."""
    try:
        # For writing: NFS takes an exclusive lock on nothing else.
        with locked(os.open(path, os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB):
            os.unlink(path)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True
