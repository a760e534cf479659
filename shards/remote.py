"""Files below one URL through fsspec: ranges of bytes, tried again with back-off, from any process."""

import errno
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import fsspec

from shards.errors import UserError
from shards.index import Index, Shard

Pause = Callable[[float], object]  # waits that many seconds; what it raises ends the tries

_SLOWEST = 256 * 1024  # bytes/s; a request that is slower has timed out
_MISSING, _REFUSED, _BEYOND_END = {404, 410}, {401, 403}, 416


class StoreError(UserError):
    """The store itself does not answer or refuses access, or the cache cannot be written: this ends the run."""


class ShortRead(OSError):
    """The store's file ends before the bytes that were asked for."""


@dataclass(frozen=True)
class Retry:
    """`wait`: seconds before the second try; it doubles each time, times a random factor in [0.5, 1.5).

    `timeout`: seconds for an answer to begin; its bytes have more time.
    """

    tries: int = 6
    wait: float = 1.0
    timeout: float = 30.0

    def waits(self) -> Iterator[float]:
        """After each try but the last."""
        return (self.wait * 2**number * random.uniform(0.5, 1.5) for number in range(self.tries - 1))


@dataclass(frozen=True)
class _Scheme:
    package: str
    access: str  # what to check where access is refused


_HTTP = _Scheme("aiohttp", "the address; headers go into FSSPEC_HTTP_CLIENT_KWARGS='{\"headers\": {...}}'")
SCHEMES = {
    "s3": _Scheme(
        "s3fs",
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; FSSPEC_S3_ANON=true for a public bucket. S3 says "
        "this of a missing file, too, where the bucket may not be listed",
    ),
    "gs": _Scheme("gcsfs", "GOOGLE_APPLICATION_CREDENTIALS; FSSPEC_GS_TOKEN=anon for a public bucket"),
    "hf": _Scheme("huggingface_hub", "HF_TOKEN, and the dataset's terms on its page"),
    "http": _HTTP,
    "https": _HTTP,
}
_RETRY = Retry()


class Remote:
    """It may be pickled, used by threads and after a fork: each process connects for itself, when it first reads."""

    def __init__(self, url: str, retry: Retry = _RETRY) -> None:
        self.url, self._retry = url.rstrip("/"), retry
        self._scheme = url.partition("://")[0]
        # By process. What a parent connected stays here unused: to close it would disturb the parent's event loop.
        self._systems: dict[int, Any] = {}
        self._locks: dict[int, threading.Lock] = {}
        self._short: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return Remote, (self.url, self._retry)

    def where(self, name: str) -> str:
        """The file's URL, without a password that the given one had."""
        return re.sub(r"//[^/@]*@", "//", self._address(name))

    def read(self, name: str, offset: int, size: int, pause: Pause = time.sleep) -> bytes:
        """Bytes [offset, offset + size) of a file.

        FileNotFoundError where it is missing, ShortRead where it ends before; StoreError where the store refuses
        access, cannot read ranges, or fails all tries.
        """
        return self._persist(name, lambda: self._exactly(name, offset, size), pause) if size else b""

    def start(self, name: str, limit: int) -> bytes:
        """The first `limit` bytes of a file, fewer where it ends before; errors as for `read`."""
        return self._persist(name, lambda: self._request(name, 0, limit), time.sleep)

    def close(self) -> None:
        """Ends this process's connections; the next read connects again."""
        self._systems.pop(os.getpid(), None)

    def _persist(self, name: str, request: Callable[[], bytes], pause: Pause) -> bytes:
        began = time.monotonic()
        # A file once found too short is not waited for again: there may be thousands of samples behind its end.
        waits = iter([] if name in self._short else self._retry.waits())
        while True:
            try:
                return request()
            except (FileNotFoundError, UserError):
                raise
            except Exception as error:  # each library has its own
                last = error
            wait = next(waits, None)
            if wait is None:
                raise self._given_up(name, last, time.monotonic() - began) from last
            pause(wait)

    def _given_up(self, name: str, last: Exception, seconds: float) -> Exception:
        if isinstance(last, ShortRead):
            self._short.add(name)
            return last
        reason = str(last) or "no answer in time"
        return StoreError(
            f"{self.where(name)} cannot be read: {self._retry.tries} tries in {seconds:.0f} s failed, the last with "
            f"{type(last).__name__}: {reason}. Check the address, the network and the store, then start again; what "
            "was fetched is kept."
        )

    def _exactly(self, name: str, offset: int, size: int) -> bytes:
        data = self._request(name, offset, size)
        if len(data) < size:
            raise ShortRead(f"{self.where(name)} ends after {len(data)} of {size} bytes at offset {offset}")
        return data

    def _request(self, name: str, offset: int, size: int) -> bytes:
        """At most `size` bytes; what the libraries raise, told apart."""
        try:
            data = self._cat(name, offset, size)
        except UserError:
            raise
        except Exception as error:  # each library has its own
            status = _status(error)
            if isinstance(error, FileNotFoundError) or status in _MISSING:
                raise FileNotFoundError(errno.ENOENT, "no such file in the store", self.where(name)) from error
            if isinstance(error, PermissionError) or status in _REFUSED or "NoCredentials" in type(error).__name__:
                raise self._refused(name, error) from error
            if status != _BEYOND_END:
                raise
            return b""
        if len(data) > size:
            raise StoreError(
                f"{self.where(name)}: the server ignores ranges, it sent {len(data)} bytes for {size} at offset "
                f"{offset}. Serve the data with one that has them (nginx, caddy, S3; not `python -m http.server`)."
            )
        return data

    def _cat(self, name: str, offset: int, size: int) -> bytes:
        system = self._system()
        # fsspec bounds the time of its asynchronous file systems; others (hf) have a time limit of their own, and must
        # be kept from reading ahead.
        options = {"timeout": self._retry.timeout + size / _SLOWEST} if system.async_impl else {"cache_type": "none"}
        data: bytes = system.cat_file(self._address(name), start=offset, end=offset + size, **options)
        return data

    def _refused(self, name: str, error: Exception) -> StoreError:
        access = SCHEMES[self._scheme].access
        return StoreError(f"{self.where(name)}: access is refused ({type(error).__name__}: {error}). Check {access}.")

    def _address(self, name: str) -> str:
        return f"{self.url}/{quote(name) if SCHEMES[self._scheme] is _HTTP else name}"

    def _system(self) -> Any:
        process = os.getpid()
        with self._locks.setdefault(process, threading.Lock()):
            if process not in self._systems:
                self._systems[process] = _connect(self._scheme)
            return self._systems[process]


class RangeStore:
    """A `Store` that reads each sample, and nothing else, from the remote store."""

    fetches_ahead = False

    def __init__(self, remote: Remote, index: Index) -> None:
        self._remote = remote
        self._shards = {shard.name: shard for split in index.splits for shard in split.shards}

    def read(self, name: str, offset: int, size: int) -> bytes:
        check_span(self.where, self._shards[name], offset, size)
        return self._remote.read(name, offset, size)

    def where(self, name: str) -> str:
        return self._remote.where(name)

    def ahead(self, names: Iterable[str]) -> None:
        """Does nothing: there is nowhere to keep what would be fetched."""

    def close(self) -> None:
        self._remote.close()


def check_span(where: Callable[[str], str], shard: Shard, offset: int, size: int) -> None:
    """Raises OSError for bytes outside the shard, before anything is asked for or allocated."""
    if not 0 <= offset <= offset + size <= shard.num_bytes:
        raise OSError(
            f"bytes [{offset}, {offset + size}) are not inside {where(shard.name)}, which has {shard.num_bytes}"
        )


def _connect(scheme: str) -> Any:
    """A file system of its own: fsspec's shared ones belong to whoever made them first."""
    package = SCHEMES[scheme].package
    try:
        system = fsspec.filesystem(scheme, skip_instance_cache=True, **_options(scheme))
    except ImportError as error:
        raise UserError(
            f"{scheme}:// needs {package}, which is not installed ({error}): pip install {package}"
        ) from error
    if scheme == "s3":
        system.retries = 1  # tries are counted here, once
    return system


def _options(scheme: str) -> dict[str, Any]:
    """What fsspec's own configuration (FSSPEC_<SCHEME>_<OPTION>, ~/.config/fsspec) does not say."""
    if scheme == "s3":
        given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        return {"config_kwargs": {"retries": {"total_max_attempts": 1}, **given}}
    # Ranges of a compressed answer would be other bytes.
    return {"headers": {"Accept-Encoding": "identity"}} if SCHEMES[scheme] is _HTTP else {}


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that an error of aiohttp, botocore, gcsfs or huggingface_hub carries, or one that caused it."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):  # of botocore
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        for holder, field in ((error, "status"), (error, "code"), (response, "status_code")):
            if isinstance(status := getattr(holder, field, None), int):
                return status
        error = error.__cause__
    return None
