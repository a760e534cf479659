"""The shard cache: right bytes, each fetched once, within the bound, whoever shares it and whoever is killed."""

import fcntl
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import threading
import time
from contextlib import ExitStack

import pytest
from remote_server import broken_after, cut_to, other_bytes, serve, status, stuck_until, well

from shards.cache import CachedStore
from shards.cache_directory import REMEMBERED_SECONDS, CacheDirectory, cached_name
from shards.errors import UserError
from shards.reader import Reader
from shards.remote import Remote, Retry
from shards.remote_index import fetch_index
from shards.store import StoreError, StoreOptions, open_data

RETRY = Retry(tries=3, wait=0.01)
FORKSERVER = multiprocessing.get_context("forkserver")
NAMES = [f"train-{number:06d}.tar" for number in range(5)]
FIRST = NAMES[0]
CHUNK = 4096


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def opened(server, cache):
    """The server's data behind a cache of so many bytes; closed at the end."""
    with ExitStack() as stack:

        def open_store(bound=1_000_000, chunk=1 << 20):
            store = make_store(server.url, cache, bound, chunk)
            stack.callback(store.close)
            server.requests.clear()
            return store

        yield open_store


@pytest.fixture
def sizes(index):
    return {shard.name: shard.num_bytes for shard in index.split("train").shards}


def make_store(url, cache, bound, chunk):
    remote = Remote(url, RETRY)
    return CachedStore(remote, fetch_index(remote, cache), CacheDirectory(cache, bound), chunk)


def everything(index, store):
    reader = Reader(index, "train", store)
    return [(reader.key(sample), *reader.read(sample, bytes)) for sample in range(len(reader))]


def cached(cache, kind=""):
    """Files of the cache by their shard's name: whole ones, or of the kinds part- and wrong-."""
    return {path.name.split("-", 3 if kind else 2)[-1]: path for path in cache.glob(f"*/{kind}[0-9a-f]*-*-*.tar")}


def used(path, seconds_ago):
    os.utime(path, (time.time() - seconds_ago,) * 2)


def until(condition):
    """Waits for what other threads or processes do; a test that hangs here has failed."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


# --- reading


def test_each_shard_is_fetched_once(index, opened, server, sizes):
    store = opened()
    assert everything(index, store) == everything(index, None)
    assert sorted(server.requests) == [(name, 0, size) for name, size in sizes.items()]
    assert store.where(FIRST) == f"{server.url}/{FIRST}"
    assert everything(index, pickle.loads(pickle.dumps(opened()))) == everything(index, None)
    assert server.requests == []


def test_a_user_opens_data_behind_a_cache(index, server, cache):
    opened_index, store = open_data(server.url, StoreOptions("cache", str(cache), "1MB"), RETRY)
    assert everything(opened_index, store) == everything(index, None)
    assert set(cached(cache)) == set(NAMES)


def test_a_store_after_a_fork(index, opened):
    store = opened()
    store.read(FIRST, 0, 512)
    with multiprocessing.get_context("fork").Pool(1, initializer=inherit, initargs=((index, store),)) as pool:
        assert pool.apply(read_inherited) == everything(index, None)
    assert everything(index, store) == everything(index, None)


def inherit(given):
    global inherited
    inherited = given


def read_inherited():
    return everything(*inherited)


def test_bytes_outside_a_shard(opened, server, sizes):
    with pytest.raises(OSError, match=rf"bytes \[0, {2**32}\) are not inside http.*, which has {sizes[FIRST]}"):
        opened().read(FIRST, 0, 2**32)
    assert server.requests == []


def test_a_cached_shard_that_something_cut_is_fetched_again(index, opened, cache):
    store = opened()
    store.read(FIRST, 0, 512)
    os.truncate(cached(cache)[FIRST], 100)
    assert everything(index, store) == everything(index, None)


def test_a_cache_that_somebody_removes(index, opened, cache):
    store = opened()
    store.read(FIRST, 0, 512)
    shutil.rmtree(cache)
    assert store.read(FIRST, 0, 512) == (index.root / FIRST).read_bytes()[:512]


# --- failures of the store


def test_a_broken_download_goes_on_where_it_broke(index, opened, server, sizes):
    server.fail(FIRST, well, broken_after(10), status(503), well, cut_to(10))
    store = opened(chunk=CHUNK)
    assert store.read(FIRST, 0, sizes[FIRST]) == (index.root / FIRST).read_bytes()
    assert [start // CHUNK for start, _ in server.ranges(FIRST)] == [0, 1, 1, 1, 2, 2, 3, 4]


def test_what_was_fetched_outlives_a_store_that_stops_answering(index, opened, server):
    server.fail(FIRST, well)
    server.always[FIRST] = status(500)
    with pytest.raises(StoreError, match=rf"{FIRST} cannot be read: 3 tries"):
        opened(chunk=CHUNK).read(FIRST, 0, 512)
    del server.always[FIRST]
    assert opened(chunk=CHUNK).read(FIRST, 0, 512) == (index.root / FIRST).read_bytes()[:512]
    assert server.ranges(FIRST)[0][0] == CHUNK


def test_other_bytes_once(index, opened, server):
    server.fail(FIRST, other_bytes)
    assert opened().read(FIRST, 0, 512) == (index.root / FIRST).read_bytes()[:512]
    assert len(server.requests) == 2


def test_a_part_that_is_too_long(index, opened, cache, sizes):
    store = opened()
    store.read(FIRST, 0, 512)
    whole = cached(cache)[FIRST]
    os.truncate(whole.rename(whole.with_name(f"part-{whole.name}")), sizes[FIRST] + 512)
    assert everything(index, store) == everything(index, None)
    assert not cached(cache, "part-")


def another_shard(root):
    shutil.copy(root / NAMES[1], root / FIRST)


def other_content(root):
    content = bytearray((root / FIRST).read_bytes())
    content[700] ^= 1
    (root / FIRST).write_bytes(content)


def shorter(root):
    os.truncate(root / FIRST, 1000)


def missing(root):
    (root / FIRST).unlink()


@pytest.mark.parametrize(
    ("harm", "reason", "requests"),
    [
        (another_shard, "ends after 14848 of 17408 bytes", 3),
        (other_content, "is not the file that the index names: its sha256 is .* in the index", 2),
        (shorter, "ends after 1000 of 17408 bytes", 3),
        (missing, "no such file in the store", 1),
    ],
)
def test_a_shard_that_cannot_be_had(index, opened, server, cache, harm, reason, requests):
    whole = (index.root / FIRST).read_bytes()
    store = opened()
    store.read(NAMES[2], 0, 512)
    server.requests.clear()
    harm(index.root)
    for reader in (store, pickle.loads(pickle.dumps(store))):  # another process knows it, too
        with pytest.raises(OSError, match=rf"{FIRST}.*{reason}|{reason}.*{FIRST}"):
            reader.read(FIRST, 0, 512)
        assert len(server.requests) == requests
    assert not cached(cache, "part-")
    (index.root / FIRST).write_bytes(whole)
    with pytest.raises(OSError, match=reason):
        store.read(FIRST, 0, 512)
    store.forget()
    assert store.read(FIRST, 0, 512) == whole[:512]


@pytest.mark.parametrize("age", [REMEMBERED_SECONDS + 1, -REMEMBERED_SECONDS - 1], ids=["", "the clock went back"])
def test_notes_grow_old(index, opened, cache, age):
    missing(index.root)
    missing_then = opened(bound=40_000)
    with pytest.raises(OSError, match="no such file"):
        missing_then.read(FIRST, 0, 512)
    shutil.copy(index.root / NAMES[1], index.root / FIRST)
    used(cached(cache, "wrong-")[FIRST], age)
    with pytest.raises(OSError, match="ends after 14848 of 17408"):
        missing_then.read(FIRST, 0, 512)
    used(cached(cache, "wrong-")[FIRST], age)
    missing_then.read(NAMES[1], 0, 512)
    assert not cached(cache, "wrong-")


# --- the bound


def test_the_least_recently_used_goes_first(opened, cache, sizes):
    store = opened(bound=sum(sizes[name] for name in NAMES[:3]))
    for name in NAMES[:3]:
        store.read(name, 0, 512)
    for name, seconds_ago in zip(NAMES, (30, 50, 40), strict=False):
        used(cached(cache)[name], seconds_ago)
    store.read(NAMES[1], 0, 512)
    store.read(NAMES[3], 0, 512)
    assert set(cached(cache)) == {FIRST, NAMES[1], NAMES[3]}
    store.read(NAMES[4], 0, 512)
    assert set(cached(cache)) == {NAMES[1], NAMES[3], NAMES[4]}


def test_a_cache_that_is_smaller_than_a_shard(server, cache):
    with pytest.raises(
        UserError, match=rf"{FIRST} has 17,408 bytes, and data\.cache-size allows 15,000 in {cache}: raise"
    ):
        open_data(server.url, StoreOptions("cache", str(cache), "15KB"), RETRY)


def test_without_room_samples_are_read_by_range(index, opened, server, cache, sizes):
    store = opened(bound=sizes[FIRST])
    store.read(FIRST, 0, 512)
    with open(cached(cache)[FIRST]) as in_use:
        fcntl.flock(in_use, fcntl.LOCK_SH)
        assert store.read(NAMES[1], 512, 1000) == (index.root / NAMES[1]).read_bytes()[512:1512]
    assert server.ranges(NAMES[1]) == [(512, 1512)]
    assert set(cached(cache)) == {FIRST}
    store.read(NAMES[1], 512, 1000)
    assert set(cached(cache)) == {NAMES[1]}


def test_two_datasets_share_the_bound(index, source, written, server, opened, cache, tmp_path):
    store = opened(bound=20_000)
    store.read(FIRST, 0, 512)
    other = written(source, tmp_path / "other", split="val")
    with serve(other.root) as second:
        make_store(second.url, cache, 20_000, CHUNK).read("val-000000.tar", 0, 512)
    assert list(cached(cache)) == ["val-000000.tar"]


@pytest.mark.parametrize(("bound", "fetched"), [(1_000_000, 5), (35_000, None)], ids=["roomy", "narrow"])
def test_processes_that_race(index, server, cache, bound, fetched):
    """Three processes read all samples, each in its own order: right, and never over the bound."""
    expected = everything(index, None)
    make_store(server.url, cache, bound, CHUNK)
    server.requests.clear()
    directory = CacheDirectory(cache, bound)
    with FORKSERVER.Pool(3) as pool:
        results = [pool.apply_async(read_at_random, (server.url, cache, bound, seed)) for seed in range(3)]
        while not all(result.ready() for result in results):
            with directory.locked():
                assert declared(cache) <= bound
            results[0].wait(0.002)  # others may have the lock now
        for result in results:
            assert result.get() == expected
    assert not cached(cache, "part-")
    if fetched:
        asked = [request for request in server.requests if request.name != "index.json"]
        assert len(set(asked)) == len(asked)
        assert len(cached(cache)) == fetched


def declared(cache):
    """The bytes that the cached files have or will have; they have no more now."""
    files = [*cache.glob("*/[0-9a-f]*-*-*.tar"), *cache.glob("*/part-*")]
    for file in files:
        with_size = int(file.name.removeprefix("part-").split("-")[1])
        assert file.stat().st_size <= with_size
    return sum(int(file.name.removeprefix("part-").split("-")[1]) for file in files)


def read_at_random(url, cache, bound, seed):
    store = make_store(url, cache, bound, CHUNK)
    index = fetch_index(Remote(url, RETRY), cache)
    reader, order = Reader(index, "train", store), list(range(21))
    random.Random(seed).shuffle(order)
    read = {sample: (reader.key(sample), *reader.read(sample, bytes)) for sample in order}
    store.close()
    return [read[sample] for sample in range(21)]


@pytest.mark.parametrize("waiting", [False, True], ids=["later", "meanwhile"])
def test_a_killed_download_is_finished_by_another_process(index, server, cache, sizes, waiting):
    """The bound is that of one shard: nothing else of the killed process takes room."""
    reached, released = threading.Event(), threading.Event()
    server.fail(FIRST, well, stuck_until(released, reached))
    arguments = (server.url, cache, sizes[FIRST])
    first = FORKSERVER.Process(target=read_first, args=arguments)
    first.start()
    reached.wait()
    second = FORKSERVER.Process(target=read_first, args=arguments)
    if waiting:
        second.start()
        until(lambda: len([name for name, *_ in server.requests if name == "index.json"]) == 2)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    if not waiting:
        assert cached(cache, "part-")[FIRST].stat().st_size == CHUNK
        second.start()
    second.join()
    released.set()
    assert second.exitcode == 0
    assert cached(cache)[FIRST].read_bytes() == (index.root / FIRST).read_bytes()
    assert [start // CHUNK for start, _ in server.ranges(FIRST)] == [0, 1, 1, 2, 3, 4]
    assert declared(cache) == sizes[FIRST]


def read_first(url, cache, bound):
    make_store(url, cache, bound, CHUNK).read(FIRST, 0, 512)


def test_what_a_killed_process_left_makes_room(opened, server, cache, sizes):
    server.fail(FIRST, well)
    server.always[FIRST] = status(500)
    store = opened(bound=sizes[FIRST], chunk=CHUNK)
    with pytest.raises(StoreError):
        store.read(FIRST, 0, 512)
    assert set(cached(cache, "part-")) == {FIRST}
    store.read(NAMES[1], 0, 512)
    assert set(cached(cache)) == {NAMES[1]}
    assert not cached(cache, "part-")


# --- disks


def test_a_full_disk(opened, cache, sizes):
    """/dev/full answers every write as a full disk does. What is not in use goes, then the run ends."""
    store = opened()
    for name in NAMES[:3]:
        store.read(name, 0, 512)
    whole = cached(cache)[FIRST]
    whole.unlink()
    whole.with_name(f"part-{whole.name}").symlink_to("/dev/full")
    with pytest.raises(
        StoreError, match=r"cannot write what was fetched: No space left on device\. The shard cache"
    ) as end:
        store.read(FIRST, 0, 512)
    assert f"{cache} may hold 1,000,000 bytes: make room on its disk, lower data.cache-size, or give a" in str(
        end.value
    )
    assert not cached(cache)


def test_room_on_a_full_disk(opened, cache, sizes):
    store = opened()
    for name in NAMES[:3]:
        store.read(name, 0, 512)
        used(cached(cache)[name], 60 - len(cached(cache)))
    directory = CacheDirectory(cache, 1_000_000)
    assert directory.free(sizes[FIRST] + 1)
    assert set(cached(cache)) == {NAMES[2]}
    assert directory.free(1)
    assert not directory.free(1)


def test_a_disk_that_refuses(server, cache):
    process = FORKSERVER.Process(target=read_on_a_small_disk, args=(server.url, cache))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert cached(cache, "part-")[FIRST].stat().st_size == 10_000


def read_on_a_small_disk(url, cache):
    store = make_store(url, cache, 1_000_000, CHUNK)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    with pytest.raises(StoreError, match="cannot write what was fetched: File too large"):
        store.read(FIRST, 0, 512)


def test_a_cache_that_cannot_be_written(index, opened, cache, sizes):
    store, sha256 = opened(), index.split("train").shards[0].sha256
    (cache / ".lock").mkdir()
    with pytest.raises(
        StoreError, match=rf"cannot use the cache directory: .*\.lock.* The shard cache {cache} may hold"
    ):
        store.read(FIRST, 0, 512)
    (cache / ".lock").rmdir()
    (next(cache.iterdir()) / f"part-{cached_name(sha256, sizes[FIRST], FIRST)}").mkdir()
    with pytest.raises(
        StoreError, match=r"cannot write to the shard cache: .*Is a directory.* may hold 1,000,000 bytes"
    ):
        store.read(FIRST, 0, 512)


def test_names_in_the_cache_are_not_too_long():
    name = cached_name("0" * 64, 10**12, "é" * 127 + "x")
    assert name == f"{'0' * 16}-{10**12}-{'é' * 74}x"


# --- ahead


def test_shards_are_fetched_ahead(index, opened, server, cache):
    store = opened()
    store.read(NAMES[1], 0, 512)
    store.ahead(["unknown", *NAMES])
    store.ahead(NAMES)
    until(lambda: set(cached(cache)) == set(NAMES))
    assert everything(index, store) == everything(index, None)
    assert sorted(name for name, *_ in server.requests) == sorted(NAMES)


def test_failures_ahead_are_left_to_the_reader(index, opened, cache):
    missing(index.root)
    store = opened()
    store.ahead(NAMES)
    until(lambda: set(cached(cache)) == set(NAMES[1:]))
    with pytest.raises(OSError, match="no such file in the store"):
        store.read(FIRST, 0, 512)


def test_what_waits_for_its_reader_stays(opened, cache, sizes):
    """And fills half of the cache at most; what was read makes room for more."""
    store = opened(bound=2 * (sizes[FIRST] + sizes[NAMES[1]]))
    store.ahead(NAMES)
    until(lambda: set(cached(cache)) == {FIRST, NAMES[1]})
    directory = CacheDirectory(cache, 0)
    for _ in range(50):
        with directory.locked():
            assert set(cached(cache)) == {FIRST, NAMES[1]}
    store.read(FIRST, 0, 512)
    until(lambda: len(cached(cache)) == 3)
    assert {FIRST, NAMES[1]} < set(cached(cache))
    store.read(NAMES[1], 0, 512)
    until(lambda: len(cached(cache)) == 4)
    # The reader itself goes on in any case, at the cost of what was read.
    (late,) = set(NAMES) - set(cached(cache))
    store.read(late, 0, 512)
    assert len(set(cached(cache)) & {FIRST, NAMES[1]}) == 1


def test_a_shard_that_is_wanted_again_waits_again(opened, cache):
    store = opened()
    store.read(FIRST, 0, 512)
    path = cached(cache)[FIRST]
    assert path.stat().st_atime > 0
    store.ahead([FIRST])
    until(lambda: path.stat().st_atime == 0)
    store.read(FIRST, 0, 512)
    assert path.stat().st_atime > 0


def test_closing_stops_what_is_fetched_ahead(index, opened, server):
    reached, released = threading.Event(), threading.Event()
    server.always[FIRST] = stuck_until(released, reached)
    store = opened()
    store.ahead(NAMES)
    reached.wait()
    began = time.monotonic()
    store.close()
    assert time.monotonic() - began < 2
    released.set()
    assert everything(index, store) == everything(index, None)
    store.ahead(NAMES)
    store.close()


def test_a_forked_child_fetches_ahead_itself(opened, cache):
    store = opened()
    store.ahead([FIRST])
    until(lambda: FIRST in cached(cache))
    child = multiprocessing.get_context("fork").Process(target=fetch_ahead, args=(store, cache))
    child.start()
    child.join()
    assert child.exitcode == 0


def fetch_ahead(store, cache):
    store.ahead([NAMES[1]])
    until(lambda: NAMES[1] in cached(cache))
    store.close()
