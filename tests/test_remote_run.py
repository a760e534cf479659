"""A run whose shards come over HTTP: the same as one on local shards, and an orderly stop where the server is gone."""

import json

import pytest
import ranks
from remote_server import broken_after, serve, status

PRETRAIN = "recipes/pretrain_21k.py"
WINDOW = ["--data.shuffle", "window", "--data.runs", "4", "--data.window", "10"]


@pytest.fixture
def run(start, small, tmp_path):
    """run(name, options, size) -> how a debug run ended, and its directory."""

    def launch(name: str, options: list[str], size: int):
        everything = ["--debug", *small, *WINDOW, "--run-dir", str(tmp_path / name), *options]
        return start(PRETRAIN, everything, size).wait(), tmp_path / name

    return launch


def test_a_run_over_http_is_the_run_on_local_shards(run, shards, tmp_path):
    ended, local = run("local", [], 2)
    assert ended.codes == [0, 0], "\n".join(ended.outputs)
    assert "window shuffle of 4 runs, 10 samples a window: neighbours in storage come" in ended.outputs[0]
    with serve(shards) as server:
        server.fail("train-000000.tar", status(500), broken_after(3000))
        options = ["--data.path", server.url, "--data.cache", str(tmp_path / "cache"), "--data.workers", "1"]
        ended, remote = run("remote", options, 2)
        assert ended.codes == [0, 0], "\n".join(ended.outputs)
        wanted = {shard.name for shard in shards.glob("train-*.tar")}
        assert wanted <= {request.name for request in server.requests}
    assert ranks.metrics(remote) == ranks.metrics(local)
    weights = "weights/model.safetensors"
    assert (remote / weights).read_bytes() == (local / weights).read_bytes()


def test_a_store_that_refuses_access_stops_the_run(run, shards, tmp_path):
    with serve(shards) as server:
        server.always["train-000001.tar"] = status(403)
        options = ["--data.path", server.url, "--data.cache", str(tmp_path / "cache"), "--data.remote", "range"]
        ended, directory = run("refused", options, 1)
    assert ended.codes == [2], "\n".join(ended.outputs)
    reason = json.loads((directory / "outcome.json").read_text())["reason"]
    assert reason.startswith(f"{server.url}/train-000001.tar: access is refused")
    assert not (directory / "quarantine.jsonl").exists()
