"""Data at a path or URL: the right bytes in spite of what networks do, and words for what cannot be helped."""

import json
import multiprocessing
import pickle
import shutil
import socket
import sys
import threading

import fsspec
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from remote_server import broken_after, cut_to, status, stuck_until, without_ranges

from shards import remote_index
from shards.errors import UserError
from shards.index import Index
from shards.reader import BadSample, Reader
from shards.remote import Retry
from shards.store import StoreError, StoreOptions, open_data

RETRY = Retry(tries=3, wait=0.01, timeout=0.2)
PATIENT = Retry(tries=3, wait=0.01, timeout=10)  # botocore takes a while to begin
SHARD = "train-000000.tar"


@pytest.fixture
def opened(server, tmp_path):
    """Opens the server's data to read by range, and forgets the requests that this took."""

    def open_url(**options):
        chosen = StoreOptions(**{"remote": "range", "cache": str(tmp_path / "cache"), **options})
        index, store = open_data(server.url, chosen, RETRY)
        server.requests.clear()
        return index, store

    return open_url


@pytest.fixture
def shard(index):
    return (index.root / SHARD).read_bytes()


def everything(index, store):
    reader = Reader(index, "train", store)
    return [(reader.key(sample), *reader.read(sample, bytes)) for sample in range(len(reader))]


def edit(index, change):
    path = index.root / "index.json"
    manifest = json.loads(path.read_text())
    change(manifest["splits"]["train"])
    path.write_text(json.dumps(manifest))


# --- local


def test_a_directory_by_its_path_and_url(index):
    expected = everything(index, None)
    for location in (str(index.root), index.root.as_uri(), f"file://localhost{index.root}"):
        opened, store = open_data(location)
        assert opened == index
        assert everything(opened, pickle.loads(pickle.dumps(store))) == expected
        assert store.where(SHARD) == str(index.root / SHARD)
        store.ahead([SHARD])
        store.close()
        assert everything(opened, store) == expected


def test_a_path_that_looks_like_a_url(index, tmp_path, monkeypatch):
    shutil.copytree(index.root, tmp_path / "run:1")
    monkeypatch.chdir(tmp_path)
    assert open_data("run:1")[0].splits == index.splits


@pytest.mark.parametrize(
    "location",
    [
        "pipe:cat x",
        "memory://x",
        "simplecache::s3://x/y",
        "S3://x",
        "ftp://host/x",
        "http:/x",
        "s3://",
        "file://host/x",
    ],
)
def test_other_urls(location):
    with pytest.raises(
        UserError, match=r"is not read: give a directory's path, or its URL with s3://, gs://, hf://, http"
    ):
        open_data(location)


def test_a_url_with_a_query():
    with pytest.raises(UserError, match="ends in a query or fragment: give that of the directory"):
        open_data("https://host/data?token=1")


def test_a_package_that_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gs:// needs gcsfs, which is not installed .*: pip install gcsfs"):
        open_data("gs://bucket/data", StoreOptions(cache=str(tmp_path)))


# --- the index


def test_the_index_of_remote_data(index, server, tmp_path):
    options = StoreOptions("range", str(tmp_path / "cache"))
    opened, _ = open_data(server.url, options)
    assert (opened.classes, opened.splits) == (index.classes, index.splits)
    assert opened.fingerprint("train") == index.fingerprint("train")
    assert opened.root.parent.parent == tmp_path / "cache"
    assert isinstance(opened.offsets("train"), np.memmap)
    assert open_data(server.url + "/", options)[0] == opened
    assert [request.name for request in server.requests] == ["index.json", "train.offsets.npy", "index.json"]


def test_an_index_that_changes_leaves_the_former_whole(index, source, server, written, tmp_path):
    options = StoreOptions("range", str(tmp_path / "cache"))
    former, _ = open_data(server.url, options)
    changed = written(source, tmp_path / "changed", seed=1)
    server.root = changed.root
    latter, store = open_data(server.url, options)
    assert latter.splits == changed.splits
    assert everything(latter, store) == everything(changed, None)
    assert former.offsets("train").tolist() == index.offsets("train").tolist()


def test_offsets_that_were_cut_in_the_cache_are_fetched_again(opened, server):
    index, _ = opened()
    path = index.root / "train.offsets.npy"
    rows = index.offsets("train").tolist()
    path.write_bytes(path.read_bytes()[:-1])
    assert opened()[0].offsets("train").tolist() == rows


def test_no_index(index, opened):
    (index.root / "index.json").unlink()
    with pytest.raises(UserError, match=r"there is no http://.*/data/index\.json: check the address"):
        opened()


def test_a_malformed_index_leaves_nothing_behind(index, opened, files_of, tmp_path):
    (index.root / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"the index of http://.*/data/ cannot be used: .*index\.json is malformed"):
        opened()
    assert files_of(tmp_path / "cache") == {}


def test_an_index_that_is_too_large(opened, monkeypatch):
    monkeypatch.setattr(remote_index, "_MAX_MANIFEST_BYTES", 100)
    with pytest.raises(UserError, match=r"index\.json has 100 bytes or more, as no index has"):
        opened()


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("name", "..", "'..' is no file name"),
        ("name", "", "'' is no file name"),
        ("name", "a\0b", r"'a\\x00b' is no file name"),
        ("sha256", "../../x", "has '../../x', which is no sha256"),
        ("sha256", 1, "has 1, which is no sha256"),
        ("num_bytes", -1, "has 5 samples and -1 bytes"),
        ("num_bytes", "1", "has 5 samples and '1' bytes"),
        ("num_samples", 1 << 70, "samples and 1\\d* bytes"),
    ],
)
def test_an_index_that_would_harm(index, opened, field, value, complaint):
    edit(index, lambda split: split["shards"][0].update({field: value}))
    with pytest.raises(UserError, match=complaint):
        opened()


def test_offsets_of_another_dataset(index, opened, files_of, tmp_path):
    path = index.root / "train.offsets.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(
        UserError, match=r"train\.offsets\.npy is not the file that the index names: its sha256 is .* whole"
    ):
        opened()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        UserError, match=r"train\.offsets\.npy ends after 527 of 528 bytes at offset 0\. The data is being"
    ):
        opened()
    assert [name.rpartition("/")[2] for name in files_of(tmp_path / "cache")] == ["index.json"]


def test_processes_that_open_the_same_data_fetch_offsets_once(index, server, tmp_path):
    reached, released = threading.Event(), threading.Event()
    server.fail("train.offsets.npy", stuck_until(released, reached))
    arguments = (server.url, StoreOptions("range", str(tmp_path / "cache")))
    with multiprocessing.get_context("forkserver").Pool(3) as pool:
        results = [pool.apply_async(open_and_read, arguments) for _ in range(3)]
        reached.wait()
        released.set()
        assert all(result.get() == everything(index, None) for result in results)
    assert server.ranges("train.offsets.npy") == [(0, 528)]


def open_and_read(url, options):
    index, store = open_data(url, options)
    read = everything(index, store)
    store.close()
    return read


def test_a_cache_directory_that_cannot_be(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot use the cache directory: .*; give another data\.cache"):
        open_data(server.url, StoreOptions("range", str(tmp_path / "file")))


# --- ranges


def test_samples_by_range(index, opened, server):
    opened_index, store = opened()
    assert everything(opened_index, store) == everything(index, None)
    assert store.where(SHARD) == f"{server.url}/{SHARD}"
    store.ahead([SHARD])
    assert len(server.requests) == 2 * len(index.offsets("train"))


def test_a_store_in_other_processes(index, opened):
    opened_index, store = opened()
    expected = everything(opened_index, store)
    with multiprocessing.get_context("fork").Pool(1, initializer=inherit, initargs=((opened_index, store),)) as pool:
        assert pool.apply(read_inherited) == expected
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        assert pool.apply(everything, (opened_index, store)) == expected
    assert everything(opened_index, store) == expected
    store.close()
    assert everything(opened_index, store) == expected


def inherit(given):
    global inherited
    inherited = given


def read_inherited():
    return everything(*inherited)


def never():
    return threading.Event()


@pytest.mark.parametrize(
    "fault",
    [
        status(500),
        status(503),
        status(429),
        broken_after(0),
        broken_after(700),
        cut_to(700),
        stuck_until(never(), never()),
    ],
    ids=["500", "503", "429", "no body", "broken", "cut", "stuck"],
)
def test_what_passes_is_tried_again(opened, server, shard, fault):
    _, store = opened()
    server.fail(SHARD, fault, fault)
    assert store.read(SHARD, 512, 1000) == shard[512:1512]
    assert server.ranges(SHARD) == [(512, 1512)] * 3


@pytest.mark.parametrize(
    ("fault", "last"),
    [
        (status(500), "ClientResponseError: 500"),
        (broken_after(7), "ClientPayloadError: .*received 7 of 1000 bytes"),
        (stuck_until(never(), never()), "FSTimeoutError: no answer in time"),
    ],
    ids=["500", "broken", "stuck"],
)
def test_what_does_not_pass_ends_the_run(opened, server, fault, last):
    _, store = opened()
    server.always[SHARD] = fault
    with pytest.raises(
        StoreError, match=rf"/data/{SHARD} cannot be read: 3 tries in . s failed, the last with {last}"
    ) as end:
        store.read(SHARD, 512, 1000)
    assert "Check the address, the network and the store, then start again; what was fetched is kept." in str(end.value)
    assert len(server.requests) == 3
    assert str(pickle.loads(pickle.dumps(end.value))) == str(end.value)


def test_nobody_answers():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/data"
        with pytest.raises(StoreError, match=r"/data/index\.json cannot be read: 3 tries .* ClientConnectorError"):
            open_data(nobody, StoreOptions("range"), RETRY)


@pytest.mark.parametrize("code", [401, 403])
def test_refused_access_ends_the_run_at_once(opened, server, code):
    index, store = opened()
    server.always[SHARD] = status(code)
    with pytest.raises(StoreError, match=rf"{SHARD}: access is refused .*{code}.*FSSPEC_HTTP_CLIENT_KWARGS"):
        Reader(index, "train", store).read(0, bytes)
    assert len(server.requests) == 1


def test_a_missing_shard_is_a_bad_sample(index, opened, server):
    opened_index, store = opened()
    (index.root / SHARD).unlink()
    with pytest.raises(FileNotFoundError, match=f"no such file in the store: '{server.url}/{SHARD}'"):
        store.read(SHARD, 512, 1000)
    assert len(server.requests) == 1
    with pytest.raises(BadSample, match=rf"bad sample in http://.*/{SHARD}: key unreadable, sample 0 .*no such file"):
        Reader(opened_index, "train", store).read(0, bytes)


def test_a_shorter_shard_is_a_bad_sample_and_waited_for_once(index, opened, server, shard):
    _, store = opened()
    (index.root / SHARD).write_bytes(shard[:1000])
    with pytest.raises(OSError, match=f"{SHARD} ends after 488 of 1000 bytes at offset 512"):
        store.read(SHARD, 512, 1000)
    assert len(server.requests) == 3
    with pytest.raises(OSError, match="ends after 0 of 512 bytes at offset 1024"):
        store.read(SHARD, 1024, 512)
    assert len(server.requests) == 4
    assert store.read(SHARD, 0, 1000) == shard[:1000]


def test_bytes_outside_the_shard_are_not_asked_for(opened, server, shard):
    _, store = opened()
    for offset, size in ((-512, 512), (512, len(shard)), (2**63, 1), (0, 2**32)):
        with pytest.raises(OSError, match=rf"bytes \[{offset}, {offset + size}\) are not inside http"):
            store.read(SHARD, offset, size)
    assert store.read(SHARD, 0, 0) == b""
    assert server.requests == []


def test_a_server_without_ranges(opened, server, shard):
    _, store = opened()
    server.always[SHARD] = without_ranges
    with pytest.raises(
        StoreError, match=rf"ignores ranges, it sent {len(shard)} bytes for 1000 at offset 512\. Serve the"
    ):
        store.read(SHARD, 512, 1000)
    assert store.read(SHARD, 0, len(shard)) == shard


def test_names_and_passwords_in_urls(index, server, tmp_path):
    (index.root / SHARD).rename(index.root / "a #1?%20é.tar")
    edit(index, lambda split: split["shards"][0].update(name="a #1?%20é.tar"))
    url = server.url.replace("//", "//user:secret@")
    opened, store = open_data(url, StoreOptions("range", str(tmp_path / "cache")))
    assert everything(opened, store) == everything(Index.load(index.root), None)
    assert store.where("x") == f"{server.url}/x"


def test_waits_grow_and_are_bounded():
    for waits in ([*Retry().waits()] for _ in range(20)):
        assert len(waits) == 5
        assert all(0.5 * 2**number <= wait < 1.5 * 2**number for number, wait in enumerate(waits))


@pytest.mark.parametrize("size", ["", "100", "GB", "-1GB", "1 PB", "1e3MB"])
def test_a_size_that_is_none(size):
    with pytest.raises(UserError, match=rf"data\.cache-size '{size}' is no size: give a number and a unit"):
        _ = StoreOptions(cache_size=size).cache_bytes


def test_sizes():
    sizes = ["1b", "2 KB", "1.5MB", "100GB", "2TB"]
    assert [StoreOptions(cache_size=size).cache_bytes for size in sizes] == [1, 2000, 1_500_000, 10**11, 2 * 10**12]


# --- S3


@pytest.fixture(scope="module")
def s3():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(index, s3, monkeypatch):
    """The shards in an S3 bucket; the environment is what a user sets."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    system = fsspec.filesystem("s3", skip_instance_cache=True)
    if not system.exists("bucket"):
        system.mkdir("bucket")
    system.put(f"{index.root}/", "bucket/data", recursive=True)
    return system


def test_data_in_s3(index, bucket, tmp_path):
    for remote in ("cache", "range"):
        opened, store = open_data("s3://bucket/data", StoreOptions(remote, str(tmp_path / remote), "1MB"), PATIENT)
        assert everything(opened, store) == everything(index, None)
        store.close()
    with pytest.raises(UserError, match=r"there is no s3://other/data/index\.json"):
        open_data("s3://other/data", StoreOptions(cache=str(tmp_path)), PATIENT)


def test_failures_of_s3(index, bucket, tmp_path, monkeypatch):
    _, store = open_data("s3://bucket/data", StoreOptions("range", str(tmp_path / "cache")), PATIENT)
    bucket.pipe(f"bucket/data/{SHARD}", b"short")
    with pytest.raises(OSError, match=rf"s3://bucket/data/{SHARD} ends after 0 of 1000 bytes at offset 512"):
        store.read(SHARD, 512, 1000)
    bucket.rm(f"bucket/data/{SHARD}")
    with pytest.raises(FileNotFoundError, match=f"no such file in the store: 's3://bucket/data/{SHARD}'"):
        store.read(SHARD, 512, 1000)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    store.close()
    with pytest.raises(
        StoreError, match=rf"s3://bucket/data/{SHARD} cannot be read: 3 tries in . s failed, the last with"
    ):
        store.read(SHARD, 512, 1000)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    store.close()
    with pytest.raises(StoreError, match=r"access is refused .*NoCredentialsError.*FSSPEC_S3_ANON=true for a public"):
        store.read(SHARD, 512, 1000)
