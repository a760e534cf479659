"""Copies of committed checkpoints at a URL of fsspec's, an object store's say: COMMITTED comes last there, too."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsspec.callbacks import Callback
from fsspec.core import url_to_fs

from pipeline.checkpoint.behind import Behind
from pipeline.checkpoint.whole import COMMITTED, file_names
from shards.errors import UserError

PROBE = "writable"
LOOK = 1.0  # seconds


class Uploads:
    """Copies checkpoints to a URL in a thread of its own, one at a time. One that a newer one overtakes while it waits
    is left out: a slow store delays neither the training nor its commits."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._lock = threading.Lock()
        self._behind = Behind()
        self._pieces = 0
        self._next: Path | None = None
        self._now: Path | None = None

    def add(self, directory: Path) -> None:
        with self._lock:
            if self._next is not None:
                _say(f"checkpoint {self._next.name} is not uploaded: {self.url} is slower than they come")
            self._next = directory
            idle = self._now is None
            self._now = self._now or directory
        if idle:
            self._behind.start(self._run)

    def holds(self, directory: Path) -> bool:
        """Whether it is still needed here."""
        with self._lock:
            return directory in (self._next, self._now)

    def wait(self, goes_on: Callable[[], None]) -> None:
        """Returns when nothing is left to copy; calls `goes_on` every now and then while something arrives there."""
        seen = self._pieces
        while not self._behind.ends_within(LOOK):
            if self._pieces != seen:
                seen = self._pieces
                goes_on()
        self._behind.wait()

    def _run(self) -> None:
        while (directory := self._take()) is not None:
            upload(directory, self.url, self._count)

    def _count(self, size: int | None, value: int) -> None:
        self._pieces += 1

    def _take(self) -> Path | None:
        with self._lock:
            self._now, self._next = self._next, None
            return self._now


def check_destination(url: str) -> None:
    """Raises UserError unless a file can be written below `url`."""
    try:
        system, root = url_to_fs(url)
        system.makedirs(root, exist_ok=True)
        system.pipe_file(f"{root}/{PROBE}", b"yes")
        system.rm_file(f"{root}/{PROBE}")
    except Exception as error:  # each library has its own
        raise UserError(
            f"checkpoint.upload '{url}' cannot be written ({type(error).__name__}: {error}): check the address, its "
            "credentials and that the library for it is installed (s3:// needs s3fs, gs:// gcsfs), or leave it empty"
        ) from error


def upload(directory: Path, url: str, each: Callable[[int | None, int], None]) -> None:
    """Copies a committed checkpoint to URL/step-N; `each` is called for every piece of it, as fsspec calls hooks. Where
    that fails it says so: the checkpoint itself is whole, the training goes on, and the next one is tried again."""
    try:
        system, root = url_to_fs(url)
        _copy(directory, system, f"{root}/{directory.name}", Callback(hooks={"each": each}))
    except Exception as error:  # each library has its own
        _say(
            f"error: checkpoint {directory.name} is whole here, but was not uploaded to {url} "
            f"({type(error).__name__}: {error}); the run goes on"
        )


def _copy(directory: Path, system: Any, target: str, callback: Callback) -> None:
    """Raises OSError where the sizes there are not those here."""
    sizes = {name: (directory / name).stat().st_size for name in file_names(directory)}
    if system.exists(f"{target}/{COMMITTED}"):  # of an earlier attempt at this step
        system.rm_file(f"{target}/{COMMITTED}")
    for name in sizes:
        if name != COMMITTED:
            _put(directory, name, system, target, callback)
            callback.relative_update()  # also of stores that do not call it
    system.invalidate_cache()
    wrong = [name for name, size in sizes.items() if name != COMMITTED and _size(system, f"{target}/{name}") != size]
    if wrong:
        raise OSError(f"{wrong[0]} has another size there")
    _put(directory, COMMITTED, system, target, callback)


def _put(directory: Path, name: str, system: Any, target: str, callback: Callback) -> None:
    system.makedirs(f"{target}/{name}".rpartition("/")[0], exist_ok=True)
    system.put_file(str(directory / name), f"{target}/{name}", callback=callback)


def _size(system: Any, path: str) -> int:
    return system.info(path)["size"]


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
