"""Checkpoints that are committed behind the training: of one process first, of killed and stopped ranks then."""

import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ranks
import torch

from pipeline.backend import Backend, start
from pipeline.checkpoint import Checkpoints
from pipeline.prepare import prepare
from pipeline.recipe import Recipe, parse
from pipeline.sharded import Shard
from pipeline.trainer import fit, leave, train
from recipes import finetune_1k
from shards.errors import UserError

TIME_TO_STOP = 25.0


@pytest.fixture
def behind(alone, tmp_path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", alone, keep=2, asynchronous=True)


@pytest.fixture
def go_on() -> Iterator[threading.Event]:
    """What a commit may wait for."""
    event = threading.Event()
    yield event
    event.set()  # also where the test has failed: pytest would wait for the thread


def before_writing(backend: Backend, act: Callable[[], None]) -> Backend:
    """The backend, whose writer calls `act` first, in the thread of the commit."""
    stage = backend.stage_engine

    def staged():
        write = stage()

        def acting(directory, group):
            act()
            write(directory, group)

        return acting

    backend.stage_engine = staged
    return backend


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_training_goes_on_while_a_copy_is_committed(behind, make_backend, train, go_on, strategy):
    backend = make_backend(strategy)
    train(backend, 1)
    expected = {shard.name: shard.tensor.clone() for shard in backend.shards()}
    averages = Shard("w", torch.ones(2), 0, 2)
    path = behind.save(1, before_writing(backend, go_on.wait), {"ema": [averages]}, {})
    train(backend, 2)
    averages.tensor.zero_()
    assert behind.newest() is None
    go_on.set()
    behind.wait()
    assert behind.newest() == path
    behind.load(path, backend, {"ema": [averages]})
    found = {shard.name: shard.tensor for shard in backend.shards()}
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert averages.tensor.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("precision", ["fp16", "bf16-pure"])
def test_what_low_precision_keeps_beside_is_copied_too(behind, make_backend, train, precision):
    """The scale of the loss; and fp32 masters, which the model computes with again after loading."""
    backend, go_on = make_backend("ddp", precision=precision), threading.Event()
    train(backend, 1)
    expected = {shard.name: shard.tensor.clone() for shard in backend.shards()}
    computing, scale = backend.module.weight.detach().clone(), backend.scaler.get_scale()
    path = behind.save(1, before_writing(backend, go_on.wait), {}, {})
    train(backend, 2)
    if precision == "fp16":
        backend.scaler.update(scale / 4)
    go_on.set()
    behind.wait()
    behind.load(path, backend, {})
    found = {shard.name: shard.tensor for shard in backend.shards()}
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert torch.equal(backend.module.weight, computing)
    assert backend.scaler.get_scale() == scale


def test_a_save_waits_for_the_one_before(behind, make_backend, go_on):
    waiting = threading.Event()
    first, second = before_writing(make_backend("ddp"), go_on.wait), make_backend("ddp")
    behind.save(1, first, {}, {})
    committed: list[bool] = []
    stage = second.stage_engine
    second.stage_engine = lambda: (committed.append((behind.root / "step-00000001" / "COMMITTED").exists()), stage())[1]

    def next_save() -> None:
        waiting.set()
        behind.save(2, second, {}, {})

    saving = threading.Thread(target=next_save)
    saving.start()
    waiting.wait()
    assert not committed
    go_on.set()
    saving.join()
    behind.wait()
    assert committed == [True]
    assert (behind.root / "latest").read_text() == "step-00000002"


def full() -> None:
    raise OSError(28, "No space left on device")


MESSAGE = (
    r"the checkpoint of step 2 cannot be written to .*checkpoints \(\[Errno 28\] No space left on device\): the older "
    r"checkpoints are whole; free space or permissions there and start again"
)


def save_next(behind: Checkpoints, backend: Backend) -> None:
    behind.save(3, backend, {}, {})


def leave_the_training(behind: Checkpoints, backend: Backend) -> None:
    with behind.settled():
        pass


@pytest.mark.parametrize("come_next", [save_next, leave_the_training])
def test_a_failure_is_told_once_to_whoever_comes_next(behind, make_backend, save, come_next):
    backend = make_backend("ddp")
    save(behind, backend, 1)
    behind.save(2, before_writing(make_backend("ddp"), full), {}, {})
    with pytest.raises(UserError, match=MESSAGE):
        come_next(behind, backend)
    assert behind.newest() == behind.root / "step-00000001"
    save(behind, backend, 4)
    assert behind.newest() == behind.root / "step-00000004"


def save_and_fail(behind: Checkpoints, backend: Backend, step: int) -> None:
    with behind.settled():
        behind.save(step, backend, {}, {})
        raise ZeroDivisionError


def test_an_error_of_the_training_waits_for_the_commit_and_keeps_its_message(behind, make_backend, capfd):
    for backend, step in ((make_backend("ddp"), 1), (before_writing(make_backend("ddp"), full), 2)):
        with pytest.raises(ZeroDivisionError):
            save_and_fail(behind, backend, step)
        assert behind.newest() == behind.root / "step-00000001"
    assert "error: the checkpoint of step 2 cannot be written" in capfd.readouterr().err


# --- ranks that are stopped and killed


def recipe_of(options: list[str], run_dir: Path) -> Recipe:
    more = ["--debug", *options, "--run-dir", str(run_dir), "--model.drop-path-rate", "0.2"]
    return parse(finetune_1k.make, finetune_1k.MODELS, "", more)


def interrupt(options: list[str], root: Path, strategy: str) -> None:
    """A run that rank 0 gets a SIGTERM in while its first commit is under way, goes on with, and loses rank 0 of to a
    SIGKILL while a later one is."""
    world = dataclasses.replace(start("cpu"), strategy=strategy)
    recipe = recipe_of(options, root / "killed")
    run = prepare(recipe, world)
    signalled: list[float] = []

    def terminate() -> None:
        if not signalled:
            signalled.append(time.monotonic())
            signal.raise_signal(signal.SIGTERM)

    before_writing(run.learner.backend, terminate if world.is_main else lambda: None)
    assert train(run) == "requeue"
    if world.is_main:
        assert time.monotonic() - signalled[0] < TIME_TO_STOP
        stopped = json.loads((root / "killed" / "outcome.json").read_text())["step"]
        found = {path.name for path in (root / "killed" / "checkpoints").glob("step-*")}
        assert found == {"step-00000002", f"step-{stopped:08d}"}
    run.learner.backend.close()
    world.stop.raised = False
    run = prepare(recipe, world)
    kill_self = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    before_writing(run.learner.backend, kill_self if world.is_main else lambda: None)
    train(run)


def fit_both(options: list[str], root: Path, strategy: str) -> None:
    world = dataclasses.replace(start("cpu"), strategy=strategy)
    for name in ("killed", "whole"):
        assert fit(recipe_of(options, root / name), world) == "done"
    leave(0)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.soak)])
def test_stopped_and_killed_with_a_commit_under_way(small, tmp_path, strategy):
    arguments = (small, tmp_path, strategy)
    killed = ranks.run_function(interrupt, arguments, tmp_path / "logs", 2).wait()
    assert killed.codes[0] == -signal.SIGKILL, "\n".join(killed.outputs)
    unfinished = [path.name for path in (tmp_path / "killed" / "checkpoints").glob("*.tmp")]
    assert len(unfinished) == 1
    both = ranks.run_function(fit_both, arguments, tmp_path / "logs", 2).wait()
    assert both.codes == [0, 0], "\n".join(both.outputs)
    assert not list((tmp_path / "killed" / "checkpoints").glob("*.tmp"))
    assert ranks.metrics(tmp_path / "killed") == ranks.metrics(tmp_path / "whole")
    for name in ("model", "ema", "best_model", "best_ema"):
        weights = Path("weights") / f"{name}.safetensors"
        assert (tmp_path / "killed" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
