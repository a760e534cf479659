"""Checkpoints: committed whole, pruned after that, and only whole ones found again."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import ranks
import torch

from pipeline.backend import Backend
from pipeline.checkpoint import Checkpoints, read_state
from pipeline.sharded import Shard
from shards.errors import UserError


def weights(backend: Backend) -> dict[str, torch.Tensor]:
    return {shard.name: shard.tensor.clone() for shard in backend.shards()}


def test_what_was_saved_is_restored(checkpoints, backend, save, train):
    train(backend, 1)
    path = save(checkpoints, backend, 1)
    random = torch.rand(3)
    train(backend, 2)
    expected = weights(backend)
    train(backend, 3)
    averages = Shard("w", torch.zeros(2), 0, 2)
    checkpoints.load(path, backend, {"ema": [averages]})
    assert read_state(path) == {"kept": "yes", "step": 1}
    assert averages.tensor.tolist() == [1.0, 1.0]
    assert torch.equal(torch.rand(3), random)
    train(backend, 2)
    torch.testing.assert_close(weights(backend), expected, rtol=0, atol=0)


def test_the_newest_are_kept(checkpoints, backend, save):
    for step in (1, 2, 10):
        save(checkpoints, backend, step)
    assert sorted(path.name for path in checkpoints.root.iterdir()) == ["latest", "step-00000002", "step-00000010"]
    assert (checkpoints.root / "latest").read_text() == "step-00000010"
    assert checkpoints.newest() == checkpoints.root / "step-00000010"


def test_nothing_is_found_where_nothing_was_saved(checkpoints):
    assert checkpoints.newest() is None


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {
    "not committed: .*COMMITTED": lambda path: (path / "COMMITTED").unlink(),
    "not committed: .*manifest.json": empty,
    "COMMITTED does not match": lambda path: truncate(path / "COMMITTED"),
    "COMMITTED does not match manifest.json": lambda path: flip(path / "manifest.json"),
    r"state.json: its SHA-256": lambda path: flip(path / "state.json"),
    r"engine/__0_0.distcp: its SHA-256": lambda path: truncate(path / "engine" / "__0_0.distcp"),
    r"ema/.metadata: its SHA-256": lambda path: truncate(path / "ema" / ".metadata"),
    "rng-rank-0.safetensors: .*No such file": lambda path: (path / "rng-rank-0.safetensors").unlink(),
}


@pytest.mark.parametrize("checkpoints", [False], indirect=True, ids=[""])
@pytest.mark.parametrize("reason", DAMAGES)
def test_what_is_not_whole_is_named_and_passed_over(checkpoints, backend, capsys, reason, save):
    good, bad = save(checkpoints, backend, 1), save(checkpoints, backend, 2)
    DAMAGES[reason](bad)
    assert checkpoints.newest() == good
    said = rf"checkpoint step-00000002 is not whole \(.*{reason}.*\): ignored, an older one is tried"
    assert re.search(said, capsys.readouterr().out)
    save(checkpoints, backend, 1)  # the run goes on from the good one, and its next commit must not prune that
    assert checkpoints.newest() == good


def test_where_none_is_whole_the_run_does_not_begin_anew(checkpoints, backend, save):
    for step in (1, 2):
        (save(checkpoints, backend, step) / "COMMITTED").unlink()
    with pytest.raises(
        UserError, match=r"none of the 2 checkpoints in .*checkpoints is whole \(step-00000002: not comm"
    ):
        checkpoints.newest()


def test_a_clock_that_goes_backwards(checkpoints, backend, save):
    """Steps decide which is newer, never times."""
    for step, now in ((1, 3e9), (2, 2e9), (3, 1e9)):
        path = save(checkpoints, backend, step)
        for file in (path, *path.rglob("*"), checkpoints.root / "latest"):
            os.utime(file, (now, now))
        assert checkpoints.newest() == path
    assert sorted(path.name for path in checkpoints.root.iterdir()) == ["latest", "step-00000002", "step-00000003"]


def test_an_interrupted_save_is_ignored_and_removed(checkpoints, backend, save):
    save(checkpoints, backend, 1)
    half = checkpoints.root / "step-00000002.tmp"
    half.mkdir()
    (half / "state.json").write_text("{")
    assert checkpoints.newest() == checkpoints.root / "step-00000001"
    save(checkpoints, backend, 3)
    assert not half.exists()


def test_a_disk_that_fills_up_while_committing(checkpoints, backend, save):
    """/dev/full answers every write as a full disk does."""
    older = save(checkpoints, backend, 1)
    (checkpoints.root / f"latest.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"the checkpoint of step 2 cannot be written .*No space left .*start again"):
        save(checkpoints, backend, 2)
    assert (older / "COMMITTED").exists()


def test_where_nothing_can_be_written(alone, backend, tmp_path, save):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match=r"the checkpoint of step 4 cannot be written to .*checkpoints .*free space or"):
        save(Checkpoints(tmp_path / "checkpoints", alone, keep=1), backend, 4)


def test_a_run_goes_on_from_the_newest_that_is_whole_and_never_from_nothing(finished, start, tmp_path):
    """Checkpoints of steps 4 and 8 are kept."""
    run = shutil.copytree(finished / "finetune", tmp_path / "run")
    leaves = json.loads((run / "recipe.json").read_text())
    options = ["--debug", "--run-dir", str(run), "--data.workers", "0", "--schedule.length", "8 steps"]
    names = ("data.path", "data.global_batch", "augment.image_size", "model.embed_dim", "model.start")
    for name in (*names, "evaluation.batch", "evaluation.crop_pct"):
        options += [f"--{name}".replace("_", "-"), str(leaves[name])]
    whole, kept = ranks.metrics(run), run / "checkpoints"
    truncate(kept / "step-00000008" / "engine" / "__0_0.distcp")
    again = start("recipes/finetune_1k.py", options).wait()
    assert again.codes == [0], again.outputs
    assert "checkpoint step-00000008 is not whole (engine/__0_0.distcp: its SHA-256" in again.outputs[0]
    assert "steps 4 to 8" in again.outputs[0]
    assert ranks.metrics(run) == whole
    for path in kept.glob("step-*"):
        flip(path / "manifest.json")
    refused = start("recipes/finetune_1k.py", options).wait()
    assert refused.codes == [2], refused.outputs
    assert "error: none of the 2 checkpoints in" in refused.outputs[0]
    outcome = json.loads((run / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["step"]) == ("error", 8)
    assert outcome["reason"].startswith("none of the 2 checkpoints in")
    assert ranks.metrics(run) == whole
