"""Runs of one small recipe under every strategy, in this process and its fellows."""

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import ranks
import torch
from safetensors.torch import load_file

from pipeline import sharded
from pipeline.backend import World
from pipeline.loss import SummedOverHeads
from pipeline.prepare import Run, prepare
from pipeline.recipe import Recipe, parse
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


def stop(recipe: Recipe, world: World, after: int) -> None:
    """The recipe's run up to a signal in step number `after`."""
    run = prepare(recipe, world)
    learner = dataclasses.replace(run.learner, criterion=SignalledAt(after, recipe, world))
    assert train(dataclasses.replace(run, learner=learner)) == "requeue"
    run.learner.backend.close()
    world.stop.raised = False


class SignalledAt(SummedOverHeads):
    """The recipe's criterion, in the middle of whose step number `step` rank 0 gets a SIGTERM, as from a scheduler."""

    def __init__(self, step: int, recipe: Recipe, world: World) -> None:
        super().__init__(recipe.loss)
        self.calls = step * recipe.data.accumulation if world.is_main else 0

    def __call__(self, outputs, targets):
        self.calls -= 1
        if self.calls == 0:
            signal.raise_signal(signal.SIGTERM)
        return super().__call__(outputs, targets)


def check_cut(run: Run) -> None:
    """A rank of a sharded strategy holds about its share of the averages, and not every tensor in equal pieces."""
    averages, total = run.learner.averages(), run.learner.backend.num_parameters()
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
    sharded.load(run.learner.averages(), newest / "ema")
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
