"""Whole shards of a remote store in a bounded cache on local disk, shared by all processes of a node."""

import fcntl
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from shards.ahead import Ahead
from shards.cache_directory import REMEMBERED_SECONDS, CacheDirectory, cached_name
from shards.download import CHUNK_BYTES, Downloader, is_at, locked
from shards.index import Index, Shard
from shards.remote import Pause, Remote, check_span

_TOUCH_SECONDS = 10  # a shard's last use is known to so many seconds: rewriting it with each sample would cost more
_ROOM_SECONDS = 0.5  # between looks whether there is room to fetch ahead
_ATTEMPTS = 3  # a sample whose shard is removed so often before it is read is read by range


class CachedShard:
    """Where a shard lies, or will: whole, in part, or a note why it cannot be had."""

    def __init__(self, shard: Shard, dataset: Path) -> None:
        self.shard = shard
        name = cached_name(shard.sha256, shard.num_bytes, shard.name)
        self.path, self.part, self.wrong = dataset / name, dataset / f"part-{name}", dataset / f"wrong-{name}"

    def read(self, offset: int, size: int) -> bytes | None:
        """Bytes of the whole shard; None where it is not there. It cannot be removed meanwhile."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        with locked(descriptor, fcntl.LOCK_SH):
            state = os.fstat(descriptor)
            if not state.st_nlink:
                return None
            if state.st_size != self.shard.num_bytes:  # something else wrote to it
                self.path.unlink(missing_ok=True)
                return None
            now = time.time()
            if not state.st_atime or now - state.st_mtime > _TOUCH_SECONDS:
                os.utime(descriptor, (now, now))
            return os.pread(descriptor, size, offset)

    def wanted(self) -> bool:
        """Whether the whole shard is there; it is marked as waiting for its reader."""
        try:
            os.utime(self.path, (0, time.time()))
        except FileNotFoundError:
            return False
        return True

    def note(self, reason: str) -> None:
        """Other processes need not find out for themselves why the shard cannot be had."""
        with suppress(OSError):
            self.wrong.write_text(reason)

    def check_note(self) -> None:
        """Raises OSError where the shard was found lately not to be had."""
        with suppress(FileNotFoundError):
            if abs(time.time() - self.wrong.stat().st_mtime) < REMEMBERED_SECONDS:  # a clock may have gone back
                raise OSError(self.wrong.read_text())


class CachedStore:
    """A `Store` that fetches a whole shard when a sample of it is first read, or ahead of that.

    Where the cache has no room for it (all others are in use) the sample alone is read from the remote store. Bad
    shards raise OSError, from all processes for ten minutes, or until the data is opened anew.
    """

    fetches_ahead = True

    def __init__(self, remote: Remote, index: Index, directory: CacheDirectory, chunk: int = CHUNK_BYTES) -> None:
        self._remote, self._index, self._directory, self._chunk = remote, index, directory, chunk
        self._ahead: Ahead | None = None
        self._downloader = Downloader(remote, directory.free, directory.remedy, chunk)

    def __reduce__(self) -> tuple[Any, ...]:
        return CachedStore, (self._remote, self._index, self._directory, self._chunk)

    def read(self, name: str, offset: int, size: int) -> bytes:
        shard = self._shards[name]
        check_span(self.where, shard.shard, offset, size)
        for _ in range(_ATTEMPTS):
            data = shard.read(offset, size)
            if data is not None:
                return data
            if not self._ensure(shard):
                break
        return self._remote.read(name, offset, size)

    def where(self, name: str) -> str:
        return self._remote.where(name)

    def ahead(self, names: Iterable[str]) -> None:
        if self._ahead is None or self._ahead.owner != os.getpid():
            self._ahead = Ahead(self._begin_ahead)
        self._ahead.ask(names)

    def close(self) -> None:
        if self._ahead is not None and self._ahead.owner == os.getpid():
            self._ahead.stop()
        self._ahead = None
        self._remote.close()

    def forget(self) -> None:
        """Asks the store again for shards that could not be had: somebody may have mended them."""
        for shard in self._shards.values():
            shard.wrong.unlink(missing_ok=True)

    @cached_property
    def _shards(self) -> dict[str, CachedShard]:
        dataset = self._index.root.parent
        return {shard.name: CachedShard(shard, dataset) for split in self._index.splits for shard in split.shards}

    def _ensure(self, shard: CachedShard) -> bool:
        """Fetches the shard unless it is there; False where there is no room."""
        while not shard.path.exists():
            shard.check_note()
            part = self._directory.claim(shard.part, shard.shard.num_bytes, ahead=False)
            if part is None:
                return False
            with locked(part):
                self._complete(part, shard, time.sleep, ahead=False)
        return True

    def _begin_ahead(self, name: str, pause: Pause) -> Callable[[], None] | None:
        """Waits for room; returns what fetches the shard into it, or None where it is there."""
        shard = self._shards[name]
        while not shard.wanted():
            shard.check_note()
            part = self._directory.claim(shard.part, shard.shard.num_bytes, ahead=True)
            if part is not None:
                return partial(self._finish_ahead, part, shard, pause)
            pause(_ROOM_SECONDS)
        return None

    def _finish_ahead(self, part: int, shard: CachedShard, pause: Pause) -> None:
        with suppress(BlockingIOError), locked(part, fcntl.LOCK_EX | fcntl.LOCK_NB):  # or another process fetches it
            self._complete(part, shard, pause, ahead=True)

    def _complete(self, part: int, shard: CachedShard, pause: Pause, ahead: bool) -> None:
        """Makes a part whole, unless who had its lock before did, or gave it up."""
        if not is_at(part, shard.part):
            return
        if shard.path.exists():
            shard.part.unlink()
            return
        try:
            self._downloader.fill(part, shard.shard, pause)
        except OSError as error:
            shard.note(str(error))
            shard.part.unlink(missing_ok=True)
            raise
        now = time.time()
        os.utime(part, (0 if ahead else now, now))
        # Somebody may have emptied the cache directory; then the shard is fetched again.
        with self._directory.locked(), suppress(FileNotFoundError):
            os.rename(shard.part, shard.path)
