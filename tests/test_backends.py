"""One process, DDP, FSDP2 and ZeRO-2 on two: the same training, also after a signal and a resume."""

import dataclasses
import os
import signal
from pathlib import Path

import pytest
import ranks

from pipeline.backend import World, start
from pipeline.loss import SummedOverHeads
from pipeline.prepare import prepare
from pipeline.recipe import Recipe, parse
from pipeline.trainer import fit, leave, train
from recipes import finetune_1k
from shards.errors import UserError

STEPS = 20
STOPPED_STEPS, STOPPED_AFTER = 10, 5
STRATEGIES = ("ddp", "fsdp", "deepspeed")
TOLERANCE, BF16_TOLERANCE = 1e-5, 2e-3


def recipe_of(options: list[str], run_dir: Path, steps: int = STEPS, drop_path_rate: float = 0.0) -> Recipe:
    """The fine-tuning's debug form, with accumulation, clipping and the average on; without drop path its parity form,
    for masks inside a model are drawn a rank."""
    more = ["--run-dir", str(run_dir), "--model.drop-path-rate", str(drop_path_rate), "--data.accumulation", "2"]
    more += ["--schedule.length", f"{steps} steps", "--optimizer.clip-norm", "0.5"]
    return parse(finetune_1k.make, finetune_1k.MODELS, "", ["--debug", *options, *more])


def fit_each(strategies: tuple[str, ...], options: list[str], root: Path) -> None:
    """Per strategy, in this one pair of processes: the parity run, and one with drop path that goes through beside one
    that is stopped and resumed."""
    world = start("cpu")
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(ranks.ROOT / "ds_configs" / "zero2.json")
    check_ranks_that_see_the_same_samples(world, recipe_of(options, root / "same"))
    for strategy in strategies:
        placed = dataclasses.replace(world, strategy=strategy)
        assert fit(recipe_of(options, root / strategy), placed) == "done"
        assert fit(recipe_of(options, root / f"{strategy}-whole", STOPPED_STEPS, 0.2), placed) == "done"
        stopped = recipe_of(options, root / f"{strategy}-stopped", STOPPED_STEPS, 0.2)
        stop(stopped, placed)
        assert fit(stopped, placed) == "done"
        stop(recipe_of(options, root / f"{strategy}-moved"), placed)
        bf16 = recipe_of([*options, "--runtime.precision", "bf16"], root / f"{strategy}-bf16")
        assert fit(bf16, placed) == "done"
    leave(0)


def check_ranks_that_see_the_same_samples(world: World, recipe: Recipe) -> None:
    if world.size > 1:
        run = prepare(recipe, world)
        deluded = dataclasses.replace(run.input.stream, world=OnRankZero(world))
        with pytest.raises(UserError, match=r"the first micro-batches of the 2 ranks hold 8 samples, but only 4"):
            deluded.check_disjoint()
        run.learner.backend.close()


class OnRankZero:
    """A world in which every rank believes to be the first, as when a launcher's variables are lost."""

    def __init__(self, world: World) -> None:
        self.rank, self.size, self.gather = 0, world.size, world.gather


def stop(recipe: Recipe, world: World) -> None:
    """The recipe's run up to a signal."""
    run = prepare(recipe, world)
    learner = dataclasses.replace(run.learner, criterion=SignalledAt(STOPPED_AFTER, recipe, world))
    assert train(dataclasses.replace(run, learner=learner)) == "requeue"
    run.learner.backend.close()
    world.stop.raised = False


def finish_alone(options: list[str], root: Path) -> None:
    """What two ranks of FSDP2 began is taken over by one process of DDP; what ZeRO-2 began is refused."""
    world = start("cpu")
    assert fit(recipe_of(options, root / "fsdp-moved"), world) == "done"
    with pytest.raises(UserError, match=r"saved by 2 ranks of deepspeed, and cannot be continued by 1 ranks of ddp"):
        fit(recipe_of(options, root / "deepspeed-moved"), world)
    leave(0)


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


@pytest.fixture(scope="module")
def runs(tmp_path_factory, shards):
    root = tmp_path_factory.mktemp("backends")
    options = ["--data.path", str(shards), "--data.global-batch", "16", "--augment.image-size", "16"]
    options += [
        "--model.embed-dim",
        "24",
        "--evaluation.batch",
        "8",
        "--checkpoint.every",
        "100%",
        "--data.workers",
        "0",
    ]
    alone = ranks.run_function(fit_each, (("ddp",), options, root / "one"), root / "logs", 1)
    pair = ranks.run_function(fit_each, (STRATEGIES, options, root / "two"), root / "logs", 2)
    ends = [alone.wait(), pair.wait()]
    ends.append(ranks.run_function(finish_alone, (options, root / "two"), root / "logs", 1).wait())
    for ended in ends:
        assert set(ended.codes) == {0}, "\n".join(ended.outputs)
    return root


@pytest.mark.parametrize("strategy", [*STRATEGIES, "fsdp-moved"])
def test_losses_norms_and_averages_equal_those_of_one_process(runs, strategy):
    expected, found = ranks.metrics(runs / "one" / "ddp"), ranks.metrics(runs / "two" / strategy)
    assert len(expected) == STEPS + 2
    for line, reference in zip(found, expected, strict=True):
        assert line.pop("split", None) == reference.pop("split", None)
        assert line == pytest.approx(reference, rel=TOLERANCE)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bf16_is_near_fp32_and_is_not_fp32(runs, strategy):
    fp32, bf16 = (ranks.metrics(runs / "two" / f"{strategy}{suffix}")[:STEPS] for suffix in ("", "-bf16"))
    for name, tolerance in (("loss", BF16_TOLERANCE), ("lr", 0)):
        expected = [line[name] for line in fp32 if name in line]
        assert [line[name] for line in bf16 if name in line] == pytest.approx(expected, rel=tolerance)
    assert bf16[1]["grad_norm"] != pytest.approx(fp32[1]["grad_norm"], rel=TOLERANCE)


@pytest.mark.parametrize("run", ["one/ddp", *(f"two/{strategy}" for strategy in STRATEGIES)])
def test_a_stopped_run_resumes_bitwise(runs, run):
    whole, stopped = runs / f"{run}-whole", runs / f"{run}-stopped"
    assert ranks.metrics(stopped) == ranks.metrics(whole)
    for name in ("model", "ema", "best_model", "best_ema"):
        weights = Path("weights") / f"{name}.safetensors"
        assert (stopped / weights).read_bytes() == (whole / weights).read_bytes()
