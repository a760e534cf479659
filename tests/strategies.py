"""Runs of one small recipe under every strategy, in this process and its fellows."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
from collections.abc import Collection, Sequence
from pathlib import Path

import ranks
import torch
from safetensors.torch import load_file

from pipeline import sharded
from pipeline.backend import World
from pipeline.backend.base import skipped
from pipeline.loss import SummedOverHeads
from pipeline.prepare import prepare
from pipeline.recipe import Recipe, parse
from pipeline.run import Run
from pipeline.trainer import train
from recipes import finetune_1k

ZERO = ("zero1", "zero2", "zero3")
TINY = {
    "data.global-batch": 16,
    "data.workers": 0,
    "data.accumulation": 2,
    "augment.image-size": 16,
    "model.embed-dim": 24,
    "model.drop-path-rate": 0,
    "optimizer.clip-norm": 0.5,
    "evaluation.batch": 8,
    "checkpoint.every": "50%",
}
"""Accumulation, clipping and the average are on. 5 classes, and position tables of one row, cut unevenly."""


def recipe_of(data: Path, run_dir: Path, steps: int, options: Sequence[str] = ()) -> Recipe:
    """The fine-tuning's debug form, in its parity form: no drop path, for masks inside a model are drawn a rank."""
    given = TINY | {"data.path": data, "run-dir": run_dir, "schedule.length": f"{steps} steps"}
    texts = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    return parse(finetune_1k.make, finetune_1k.MODELS, "", ["--debug", *texts, *options])


def place(world: World, strategy: str, directory: Path) -> World:
    """The world as a launch file of that strategy would have made it."""
    if strategy not in ZERO:
        return dataclasses.replace(world, strategy=strategy)
    config = json.loads((ranks.ROOT / "ds_configs" / f"{strategy}.json").read_text())
    # Parameters below it (100,000 elements by default) stay whole on every rank: all of a tiny model's.
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = directory / f"{strategy}-rank-{world.rank}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(path)
    return dataclasses.replace(world, strategy="deepspeed")


def half_of(run_dir: Path, world: World) -> Path:
    """A copy of the run as if it had been killed after the checkpoint in its middle."""
    copy = run_dir.with_name(f"{run_dir.name}-resumed")
    if world.is_main:
        shutil.copytree(run_dir, copy)
        shutil.rmtree(sorted((copy / "checkpoints").glob("step-*"))[-1])
    world.barrier()
    return copy


class Whole(SummedOverHeads):
    """The recipe's criterion, for a run that goes on from where it stands."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.recipe.loss)
        self.accumulation = run.recipe.data.accumulation
        self.calls = itertools.count(run.progress.start * self.accumulation)


class Injured(Whole):
    """On the last rank the loss goes wrong as INJURIES say."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.hit = run.world.rank == run.world.size - 1

    def __call__(self, outputs, targets):
        loss = super().__call__(outputs, targets)
        step, position = divmod(next(self.calls), self.accumulation)
        micro_batch, injury = INJURIES.get(step + 1, (0, None))
        if injury is None or position != micro_batch % self.accumulation:
            return loss
        self.calls = itertools.count((step + 1) * self.accumulation)  # the rest of the step is not asked for
        return injury(loss) if self.hit else loss


def bad_gradient(loss: torch.Tensor) -> torch.Tensor:
    """The loss as it is, with a gradient that is no number."""
    return loss + 0 * torch.sqrt(loss - loss.detach())


class Spiked(Whole):
    """On the last rank the loss of step SPIKE leaps up."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.factor = 100 if run.world.rank == run.world.size - 1 else 1

    def __call__(self, outputs, targets):
        loss = super().__call__(outputs, targets)
        return self.factor * loss if next(self.calls) // self.accumulation + 1 == SPIKE else loss


SPIKE, WATCHED = 14, ["--runtime.spike", "3"]
INJURIES = {3: (-1, lambda loss: loss * float("nan")), 5: (0, lambda loss: loss / 0), 7: (-1, bad_gradient)}
"""Step -> which of its micro-batches, and what becomes of the loss: as many as runtime.max_skipped allows."""


def stop(recipe: Recipe, world: World, after: int, kind: type[Whole]) -> None:
    """The recipe's run up to a SIGTERM, as from a scheduler, that rank 0 gets in the middle of step number `after`."""
    run = prepare(recipe, world)
    criterion, calls = kind(run), itertools.count(1)

    def signalled(outputs, targets):
        if world.is_main and next(calls) == after * recipe.data.accumulation:
            signal.raise_signal(signal.SIGTERM)
        return criterion(outputs, targets)

    signalled.state = criterion.state
    learner = dataclasses.replace(run.learner, criterion=signalled)
    assert train(dataclasses.replace(run, learner=learner)) == "requeue"
    run.learner.backend.close()
    world.stop.raised = False


def fit_injured(recipe: Recipe, world: World, kind: type[Whole] = Injured) -> None:
    run = prepare(recipe, world)
    train_injured(run, kind)
    run.learner.backend.close()


def train_injured(run: Run, kind: type[Whole] = Injured) -> None:
    """To the end, through what goes wrong."""
    learner = dataclasses.replace(run.learner, criterion=kind(run))
    assert train(dataclasses.replace(run, learner=learner)) == "done"


def fit_without(recipe: Recipe, world: World, left_out: Collection[int]) -> None:
    """What an injured run must come to: in the steps that are left out nothing at all is done."""
    run = prepare(recipe, world)
    step, count = run.learner.backend.step, itertools.count(1)

    def leave_out(criterion, batches):
        return skipped([0.0]) if next(count) in left_out else step(criterion, batches)

    run.learner.backend.step = leave_out
    assert train(run) == "done"
    run.learner.backend.close()


def check_cut(run: Run) -> None:
    """A rank of a sharded strategy holds about its share of the averages, and not every tensor in equal pieces."""
    whole = [parameter.numel() for parameter in run.learner.backend.module.parameters()]
    assert any(whole) != (run.learner.backend.name == "zero3")  # which keeps nothing whole between steps
    averages, total = run.learner.pieces()["ema"], run.learner.backend.num_parameters()
    held = [len(shard.tensor) for shard in averages]
    if run.learner.backend.name == "ddp" or run.world.size == 1:
        assert sum(held) == total
        return
    ways = run.world.size // run.recipe.runtime.fsdp_replicas
    assert sum(held) < 1.2 * total / ways
    assert len({tuple(pieces) for pieces in run.world.gather(held)}) > 1


def check_reads(run: Run, finished: Path) -> None:
    """The averages that a finished run of any strategy and world saved are read, lent to the model, and given back."""
    ema = run.learner.ema
    newest = sorted((finished / "checkpoints").glob("step-*"))[-1]
    before = weights_of(run)
    sharded.load(run.learner.pieces()["ema"], newest / "ema")
    with ema.swap():
        lent = weights_of(run)
    after = weights_of(run)
    if run.world.is_main:
        assert after.keys() == before.keys()
        expected = load_file(finished / "weights" / "ema.safetensors")
        torch.testing.assert_close(lent, expected, rtol=0, atol=0)
        torch.testing.assert_close(after, before, rtol=0, atol=0)


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    """Copies of the whole model's weights, on rank 0."""
    return {name: tensor.clone() for name, tensor in run.learner.backend.full_weights().items()}
