"""Committed checkpoints that are copied to an object store."""

import json
import threading
from typing import ClassVar

import fsspec
import pytest
import ranks
from fsspec.implementations.memory import MemoryFileSystem
from moto.server import ThreadedMotoServer

from pipeline.checkpoint import Checkpoints
from pipeline.checkpoint.whole import difference, read_manifest
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
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
    yield "s3://bucket/run"
    server.stop()


@pytest.fixture
def uploading(alone, tmp_path):
    """uploading(url) -> checkpoints that are committed behind the training."""
    return lambda url: Checkpoints(tmp_path / "checkpoints", alone, keep=1, asynchronous=True, upload=url)


def test_what_is_committed_is_copied_to_s3(uploading, backend, save, s3, tmp_path):
    checkpoints = uploading(s3)
    checkpoints.check_upload()
    with checkpoints.settled():
        for step in (1, 2):
            save(checkpoints, backend, step)
    system = fsspec.filesystem("s3")
    system.invalidate_cache()
    system.get("bucket/run", str(tmp_path / "again"), recursive=True)
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["step-00000001", "step-00000002"]
    for path in (tmp_path / "again").iterdir():
        manifest = read_manifest(path)
        assert [name for name in manifest if difference(path, name, manifest[name])] == []
        assert {"engine/__0_0.distcp", "ema/.metadata", "state.json"} <= manifest.keys()


class Stopped(MemoryFileSystem):
    """A store that loses the end of the weights, and waits before it takes them."""

    protocol = "stopped"
    go_on = threading.Event()
    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]

    def put_file(self, lpath, rpath, **kwargs):
        self.go_on.wait()
        super().put_file(lpath, rpath, **kwargs)
        if rpath.endswith(".distcp"):
            self.pipe_file(rpath, self.cat_file(rpath)[:-1])


def test_a_copy_that_is_not_whole_is_never_committed_there(uploading, backend, save, capfd):
    fsspec.register_implementation("stopped", Stopped, clobber=True)
    checkpoints = uploading("stopped://run")
    first = save(checkpoints, backend, 1)  # committed here, while the store still waits
    assert checkpoints.newest() == first
    Stopped.go_on.set()
    second = save(checkpoints, backend, 2)
    checkpoints.uploads.wait()
    assert [name for name in Stopped.store if name.endswith(f"run/{second.name}/manifest.json")]
    assert not [name for name in Stopped.store if name.endswith("COMMITTED")]
    told = capfd.readouterr().err
    assert "error: checkpoint step-00000001 is whole here, but was not uploaded to stopped://run" in told
    assert "(OSError: ema/__0_0.distcp has another size there); the run goes on" in told


@pytest.mark.parametrize(("url", "reason"), [("nosuch://x", "Protocol not known"), ("file:///sys/x", "Error: ")])
def test_a_destination_that_cannot_be_written_is_refused_first(uploading, url, reason):
    with pytest.raises(UserError, match=rf"checkpoint.upload '{url}' cannot be written .*{reason}.*check the address"):
        uploading(url).check_upload()


def test_a_run_is_done_when_its_last_checkpoint_is_uploaded(start, small, tmp_path):
    options = ["--debug", *small, "--run-dir", str(tmp_path / "run"), "--checkpoint.upload", f"file://{tmp_path}/there"]
    ended = start("recipes/pretrain_21k.py", [*options, "--schedule.length", "2 steps"]).wait()
    assert ended.codes == [0], ended.outputs
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["outcome"] == "done"
    here, there = tmp_path / "run" / "checkpoints" / "step-00000002", tmp_path / "there" / "step-00000002"
    assert {path.name: path.read_bytes() for path in there.glob("*.json")} == {
        path.name: path.read_bytes() for path in here.glob("*.json")
    }
    assert (there / "COMMITTED").exists()
    assert ranks.metrics(tmp_path / "run")
