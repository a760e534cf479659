"""Runs that go on with another number of ranks, or under another strategy: the same training."""

import dataclasses
import os
import signal
from pathlib import Path

import pytest
import ranks
from strategies import ZERO, place

from pipeline.backend import World, start, universal
from pipeline.loss import SummedOverHeads
from pipeline.prepare import prepare
from pipeline.recipe import Recipe, parse
from pipeline.trainer import fit, leave, train
from recipes import finetune_1k
from shards.errors import UserError

STEPS, LEG = 9, 3
TOLERANCE = 1e-5
LAUNCHES = (2, 1, 2)
"""Ranks of each."""
WHOLE = "whole"
MOVES = {
    "fsdp 2-1-2": (["fsdp"], ["fsdp"], ["fsdp"]),
    "ddp 2, fsdp 2, ddp 1": (["ddp", "fsdp"], ["ddp"], []),
    **{f"{stage} 2-1-2": ([stage], [stage], [stage]) for stage in ZERO},
}
"""Strategies of a run's legs, by launch."""


class SignalledAt(SummedOverHeads):
    """The recipe's criterion, in whose call number `count` this rank gets a SIGTERM."""

    def __init__(self, name: str, count: int) -> None:
        super().__init__(name)
        self.count = count

    def __call__(self, outputs, targets):
        self.count -= 1
        if self.count == 0:
            signal.raise_signal(signal.SIGTERM)
        return super().__call__(outputs, targets)


def recipe_of(options: list[str], run_dir: Path) -> Recipe:
    more = ["--debug", *options, "--run-dir", str(run_dir), "--schedule.length", f"{STEPS} steps"]
    more += ["--model.drop-path-rate", "0", "--checkpoint.every", "100%", "--evaluation.every", "100%"]
    # Several groups, so that ZeRO has several partitions.
    more += ["--optimizer.layer-decay", "0.8", "--optimizer.decay", "matrices"]
    return parse(finetune_1k.make, finetune_1k.MODELS, "", more)


def go_on(recipe: Recipe, world: World) -> None:
    """One leg: to the end of the run, or LEG steps on."""
    run = prepare(recipe, world)
    last = run.progress.start + LEG == STEPS
    criterion = run.learner.criterion if last else SignalledAt(recipe.loss, LEG)
    learner = dataclasses.replace(run.learner, criterion=criterion)
    assert train(dataclasses.replace(run, learner=learner)) == ("done" if last else "requeue")
    run.learner.backend.close()
    world.stop.raised = False


def launch(options: list[str], root: Path, number: int) -> None:
    """All legs that the launch of this number makes in turn."""
    world = start("cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # a launcher sets it for one rank, too, and DeepSpeed asks for it
    if number == 0:
        assert fit(recipe_of(options, root / WHOLE), world) == "done"
    for name, legs in MOVES.items():
        for strategy in legs[number]:
            go_on(recipe_of(options, root / name), place(world, strategy, root))
    if number == 1:
        for strategy in ("fsdp", "zero1"):
            told = (
                rf"saved by 1 ranks of zero2, and cannot be continued by 1 ranks of {strategy}: DeepSpeed's files fit"
            )
            with pytest.raises(UserError, match=told):
                fit(recipe_of(options, root / "zero2 2-1-2"), place(world, strategy, root))
        with pytest.raises(UserError, match=r"of 0 ranks, cannot be converted for 1 by .*FileNotFoundError: can't fin"):
            universal.load(None, world, root / "nothing" / "engine", root / "aside")
    leave(0)


def check_same(runs: Path, name: str) -> None:
    expected, found = ranks.metrics(runs / WHOLE), ranks.metrics(runs / name)
    assert len(expected) == STEPS + 1
    for line, reference in zip(found, expected, strict=True):
        assert line.pop("split", None) == reference.pop("split", None)
        assert line == pytest.approx(reference, rel=TOLERANCE)


@pytest.mark.soak
def test_runs_that_move_are_the_run_that_stays(tmp_path, shards):
    options = ["--data.path", str(shards), "--data.global-batch", "16", "--augment.image-size", "16"]
    options += ["--model.embed-dim", "24", "--evaluation.batch", "8", "--data.workers", "0"]
    for number, size in enumerate(LAUNCHES):
        ended = ranks.run_function(launch, (options, tmp_path, number), tmp_path / "logs", size).wait()
        assert ended.codes == [0] * size, "\n".join(ended.outputs)
    for name in MOVES:
        check_same(tmp_path, name)
    assert not list(tmp_path.glob("zero* 2-1-2/checkpoints/*.tmp")), "nothing is left of the conversion"
