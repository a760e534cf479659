"""Committed checkpoints that are copied to an object store."""

import threading
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from moto.server import ThreadedMotoServer

from pipeline.checkpoint import Checkpoints
from pipeline.checkpoint.whole import difference, file_names, read_manifest
from pipeline.recipe import Checkpoint
from shards.errors import UserError


@pytest.fixture
def s3(monkeypatch):
    """The URL of an empty bucket; the environment is what a user sets."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    # Moto's servers of one process share their buckets: test_store.py has another.
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir("uploads")
    yield "s3://uploads/run"
    server.stop()


@pytest.fixture
def uploading(alone, tmp_path):
    """uploading(url) -> checkpoints that are committed behind the training, of which the newest stays."""
    return lambda url: Checkpoints.of(tmp_path, alone, Checkpoint(keep=1, upload=url))


def test_what_is_committed_is_copied_to_s3(uploading, backend, save, s3, tmp_path):
    checkpoints = uploading(s3)
    with checkpoints.settled():
        for step in (1, 2):
            save(checkpoints, backend, step)
            checkpoints.wait_for_uploads()
    system = fsspec.filesystem("s3")
    system.invalidate_cache()
    system.get("uploads/run", str(tmp_path / "again"), recursive=True)
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["step-00000001", "step-00000002"]
    for path in (tmp_path / "again").iterdir():
        manifest = read_manifest(path)
        assert [name for name in manifest if difference(path, name, manifest[name])] == []
        assert {"engine/__0_0.distcp", "ema/.metadata", "state.json"} <= manifest.keys()


class Slow(MemoryFileSystem):
    """A store that loses the end of averages, and takes files only when it is told to."""

    protocol = "slow"
    reached, go_on = threading.Event(), threading.Event()
    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]

    def put_file(self, lpath, rpath, **kwargs):
        self.reached.set()
        self.go_on.wait()
        super().put_file(lpath, rpath, **kwargs)
        if rpath.endswith("ema/__0_0.distcp"):
            self.pipe_file(rpath, self.cat_file(rpath)[:-1])


@pytest.fixture
def slow():
    fsspec.register_implementation("slow", Slow, clobber=True)
    yield "slow://run"
    Slow.go_on.set()  # also where the test has failed: pytest would wait for the thread


def test_a_slow_store_delays_nothing_and_a_copy_that_is_not_whole_is_not_committed(
    uploading, backend, save, slow, capfd
):
    checkpoints = uploading(slow)
    first = save(checkpoints, backend, 1)
    assert Slow.reached.wait(60)
    for step in (2, 3, 4):
        path = save(checkpoints, backend, step)
        assert checkpoints.newest() == path
    assert sorted(path.name for path in checkpoints.root.glob("step-*")) == [first.name, "step-00000004"]
    Slow.go_on.set()
    checkpoints.wait_for_uploads()
    for name in ("step-00000001", "step-00000004"):
        assert [path for path in Slow.store if path.endswith(f"run/{name}/manifest.json")]
    assert not [path for path in Slow.store if path.endswith("COMMITTED")]
    told = capfd.readouterr().err
    for name in ("step-00000002", "step-00000003"):
        assert f"checkpoint {name} is not uploaded: slow://run is slower than they come" in told
    assert "error: checkpoint step-00000001 is whole here, but was not uploaded to slow://run" in told
    assert "(OSError: ema/__0_0.distcp has another size there); the run goes on" in told


@pytest.mark.parametrize(("url", "reason"), [("nosuch://x", "Protocol not known"), ("file:///sys/x", "Error: ")])
def test_a_destination_that_cannot_be_written_is_refused_first(uploading, url, reason):
    with pytest.raises(UserError, match=rf"checkpoint.upload '{url}' cannot be written .*{reason}.*check the address"):
        uploading(url)


def test_a_run_is_done_when_its_last_checkpoint_is_uploaded(finished):
    for name in ("step-00000004", "step-00000008"):
        here, there = finished / "finetune" / "checkpoints" / name, finished.parent / "uploaded" / name
        names = file_names(here)
        assert file_names(there) == names
        assert [(there / name).read_bytes() == (here / name).read_bytes() for name in names] == [True] * len(names)
