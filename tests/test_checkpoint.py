"""Checkpoints: committed whole, pruned after that, and only whole ones found again."""

import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipeline.backend import Backend, StepOptions, wrap
from pipeline.checkpoint import Checkpoints, read_state
from pipeline.optim import adamw
from pipeline.sharded import Shard
from shards.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def _group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def backend(alone) -> Backend:
    torch.manual_seed(0)
    found = wrap(alone, nn.Linear(3, 2), lambda m: adamw(m, (0.9, 0.999), 1e-8, 0.0), 4, StepOptions())
    found.set_lr(0.1)
    return found


@pytest.fixture
def checkpoints(alone, tmp_path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", alone, keep=2)


def train(backend: Backend, seed: int) -> None:
    images = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
    backend.step(lambda outputs, targets: (outputs - targets).square().mean(), [(images, torch.zeros(4, 2))])


def save(checkpoints: Checkpoints, backend: Backend, step: int) -> Path:
    return checkpoints.save(step, backend, [average(float(step))], {"kept": "yes"})


def average(value: float) -> Shard:
    return Shard("w", torch.full((2,), value), 0, 2)


def weights(backend: Backend) -> dict[str, torch.Tensor]:
    return {shard.name: shard.tensor.clone() for shard in backend.shards()}


def test_what_was_saved_is_restored(checkpoints, backend):
    train(backend, 1)
    path = save(checkpoints, backend, 1)
    random = torch.rand(3)
    train(backend, 2)
    expected = weights(backend)
    train(backend, 3)
    averages = average(0.0)
    checkpoints.load(path, backend, [averages])
    assert read_state(path) == {"kept": "yes", "step": 1}
    assert averages.tensor.tolist() == [1.0, 1.0]
    assert torch.equal(torch.rand(3), random)
    train(backend, 2)
    torch.testing.assert_close(weights(backend), expected, rtol=0, atol=0)


def test_the_newest_are_kept(checkpoints, backend):
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


DAMAGES = {
    "not committed": lambda path: (path / "COMMITTED").unlink(),
    "COMMITTED does not match manifest.json": lambda path: flip(path / "manifest.json"),
    r"state.json: its SHA-256": lambda path: flip(path / "state.json"),
    r"engine/__0_0.distcp: its SHA-256": lambda path: (path / "engine" / "__0_0.distcp").write_bytes(b""),
    "rng-rank-0.safetensors: .*No such file": lambda path: (path / "rng-rank-0.safetensors").unlink(),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_what_is_not_whole_is_named_and_passed_over(checkpoints, backend, capsys, reason):
    good, bad = save(checkpoints, backend, 1), save(checkpoints, backend, 2)
    DAMAGES[reason](bad)
    assert checkpoints.newest() == good
    said = rf"checkpoint step-00000002 is not whole \(.*{reason}.*\): ignored, an older one is tried"
    assert re.search(said, capsys.readouterr().out)
    save(checkpoints, backend, 1)  # the run goes on from the good one, and its next commit must not prune that
    assert checkpoints.newest() == good


def test_an_interrupted_save_is_ignored_and_removed(checkpoints, backend):
    save(checkpoints, backend, 1)
    half = checkpoints.root / "step-00000002.tmp"
    half.mkdir()
    (half / "state.json").write_text("{")
    assert checkpoints.newest() == checkpoints.root / "step-00000001"
    save(checkpoints, backend, 3)
    assert not half.exists()


def test_a_disk_that_fills_up_while_committing(checkpoints, backend):
    """/dev/full answers every write as a full disk does."""
    older = save(checkpoints, backend, 1)
    (checkpoints.root / f"latest.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"the checkpoint of step 2 cannot be written .*No space left .*start again"):
        save(checkpoints, backend, 2)
    assert (older / "COMMITTED").exists()


def test_where_nothing_can_be_written(alone, backend, tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match=r"the checkpoint of step 4 cannot be written to .*checkpoints .*free space or"):
        save(Checkpoints(tmp_path / "checkpoints", alone, keep=1), backend, 4)
