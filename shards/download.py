"""Whole files of a remote store, resumed where an earlier download broke off, and verified by their hash."""

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shards.index import Shard
from shards.remote import Pause, Remote, StoreError

CHUNK_BYTES = 16 << 20  # of one request; a broken one is asked for again
_FULL = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class Downloader:
    """`free` makes room on a full disk for so many bytes and says whether it could; `remedy` is said where not."""

    remote: Remote
    free: Callable[[int], bool]
    remedy: str
    chunk: int = CHUNK_BYTES

    def fill(self, part: int, shard: Shard, pause: Pause = time.sleep) -> None:
        """Appends to a locked descriptor, which holds the file's first bytes or none, what it lacks.

        OSError where the store's file is missing, shorter, or (fetched twice) has another hash; StoreError as for
        `Remote.read`, and where the disk cannot be written. What `pause` raises ends it; the next call goes on.
        """
        found = self._fetch(part, shard, pause)
        if found != shard.sha256:
            os.ftruncate(part, 0)
            found = self._fetch(part, shard, pause)
        if found != shard.sha256:
            raise OSError(
                f"{self.remote.where(shard.name)} is not the file that the index names: its sha256 is {found}, and "
                f"{shard.sha256} in the index"
            )

    def _fetch(self, part: int, shard: Shard, pause: Pause) -> str:
        """The hash of what is there when nothing lacks."""
        while (done := os.fstat(part).st_size) < shard.num_bytes:
            pause(0)
            self._append(part, self.remote.read(shard.name, done, min(self.chunk, shard.num_bytes - done), pause))
        with open(part, "rb", closefd=False) as content:
            content.seek(0)
            return hashlib.file_digest(content, "sha256").hexdigest()

    def _append(self, part: int, data: bytes) -> None:
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(part, left) :]
            except OSError as error:
                if error.errno not in _FULL or not self.free(len(left)):
                    raise StoreError(f"cannot write what was fetched: {error.strerror}. {self.remedy}") from error


def open_part(path: Path) -> int:
    """A descriptor that appends to a file, made if missing."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)


@contextmanager
def locked(descriptor: int, operation: int = fcntl.LOCK_EX) -> Iterator[int]:
    """Holds the OS lock of an open file, which dies with the process, and closes it.

    BlockingIOError where LOCK_NB is asked for and another holds it.
    """
    try:
        fcntl.flock(descriptor, operation)
        yield descriptor
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for a child that was forked meanwhile and holds a copy
        os.close(descriptor)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file still has that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
