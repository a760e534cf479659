"""One process, DDP, FSDP2 and ZeRO-2 on two: the same training, also after a signal and a resume. `make soak`: all."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import ranks
from strategies import (
    INJURIES,
    SPIKE,
    WATCHED,
    Injured,
    Spiked,
    Whole,
    check_cut,
    check_reads,
    fit_injured,
    fit_without,
    place,
    recipe_of,
    stop,
    train_injured,
)

from pipeline.backend import World, start
from pipeline.prepare import prepare
from pipeline.recipe import Recipe
from pipeline.trainer import fit, leave
from shards.errors import UserError

STEPS = 20
STOPPED_STEPS, STOPPED_AFTER = 10, 5
STRATEGIES = ("ddp", "fsdp", "zero2")
STOPPED = ["--model.drop-path-rate", "0.2", "--optimizer.decay", "matrices", "--schedule.cosine-per", "epoch"]
STOPPED += ["--schedule.cooldown", "2 steps", "--schedule.cooldown-lr", "1e-5"]
BF16 = ["--runtime.precision", "bf16"]
TOLERANCE, BF16_TOLERANCE = 1e-5, 2e-3
ROLLED_BACK = ("spiked", "rolled-back")
WEIGHTS = [Path("weights") / f"{name}.safetensors" for name in ("model", "ema", "best_model", "best_ema")]


def fit_each(strategies: tuple[str, ...], data: Path, root: Path, alone: Path) -> None:
    """Per strategy, in this one launch: the parity run, begun with the averages of the run `alone` (which the first
    step replaces), led through injuries; one with the options of STOPPED that goes through beside one that is
    stopped and resumed; and one in bf16."""
    world = start("cpu")
    if world.size == 1:
        fit_without(recipe_of(data, root / "without", STEPS), world, INJURIES)
        lost = range(STEPS // 2 + 1, SPIKE + 1)
        patient = ["--runtime.max-skipped", str(len(lost))]
        fit_without(recipe_of(data, root / "rolled-back", STEPS, patient), world, lost)
        fit_injured(recipe_of(data, root / "spiked", STEPS, WATCHED), world, Spiked)
        unsaved = [*WATCHED, "--checkpoint.every", "100%"]
        fit_injured(recipe_of(data, root / "unsaved", STEPS, unsaved), world, Spiked)
    check_ranks_that_see_the_same_samples(place(world, "ddp", root), recipe_of(data, root / "same", STEPS))
    for strategy in strategies:
        placed = place(world, strategy, root)
        run = prepare(recipe_of(data, root / strategy, STEPS), placed)
        check_cut(run)
        if world.size > 1:
            check_reads(run, alone)
        train_injured(run)
        run.learner.backend.close()
        train_thoroughly(strategy, data, root, placed)
    leave(0)


def train_thoroughly(strategy: str, data: Path, root: Path, placed: World) -> None:
    assert fit(recipe_of(data, root / f"{strategy}-whole", STOPPED_STEPS, STOPPED), placed) == "done"
    stopped = recipe_of(data, root / f"{strategy}-resumed", STOPPED_STEPS, STOPPED)
    stop(stopped, placed, STOPPED_AFTER, Whole)
    assert fit(stopped, placed) == "done"
    fit_injured(recipe_of(data, root / f"{strategy}-bf16", STEPS, BF16), placed)
    if strategy == "fsdp":
        stop(recipe_of(data, root / f"{strategy}-moved", STEPS), placed, STOPPED_AFTER, Injured)


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


def finish_alone(data: Path, root: Path) -> None:
    """One process of DDP reads all averages, takes over what two ranks of FSDP2 began, and refuses what ZeRO did."""
    world = start("cpu")
    run = prepare(recipe_of(data, root / "reader", STEPS), world)
    for strategy in STRATEGIES:
        check_reads(run, root / strategy)
    run.learner.backend.close()
    fit_injured(recipe_of(data, root / "fsdp-moved", STEPS), world)
    with pytest.raises(UserError, match=r"saved by 2 ranks of zero2, and cannot be continued by 1 ranks of ddp"):
        fit(recipe_of(data, root / "zero2", STEPS), world)
    leave(0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, shards):
    root = tmp_path_factory.mktemp("backends")
    alone = root / "one" / "ddp"
    for size, function, arguments in (
        (1, fit_each, (("ddp",), shards, root / "one", alone)),
        (2, fit_each, (STRATEGIES, shards, root / "two", alone)),
        (1, finish_alone, (shards, root / "two")),
    ):
        ended = ranks.run_function(function, arguments, root / "logs", size).wait()
        assert set(ended.codes) == {0}, "\n".join(ended.outputs)
    return root


def test_a_step_that_is_not_finite_leaves_nothing_behind(runs):
    injured, without = runs / "one" / "ddp", runs / "one" / "without"
    assert ranks.metrics(injured) == ranks.metrics(without)
    for weights in WEIGHTS:
        assert (injured / weights).read_bytes() == (without / weights).read_bytes()


def test_a_spike_takes_the_run_back_to_its_newest_checkpoint(runs):
    (line,) = lines_of(runs / "one" / "spiked" / "skipped.jsonl")
    assert line["step"] == SPIKE
    assert line["outcome"].startswith("a spike, above ")
    assert line["outcome"].endswith("the weights are those of step-00000010 again")
    after, expected = (
        [line for line in ranks.metrics(runs / "one" / run) if line["step"] > SPIKE] for run in ROLLED_BACK
    )
    assert len(after) == STEPS - SPIKE + 1
    assert after == expected
    for weights in WEIGHTS:
        assert len({(runs / "one" / run / weights).read_bytes() for run in ROLLED_BACK}) == 1


def test_a_spike_before_the_first_checkpoint_stays_and_the_average_follows(runs):
    run = runs / "one" / "unsaved"
    (line,) = lines_of(run / "skipped.jsonl")
    assert line["step"] == SPIKE
    assert line["outcome"].endswith("there is no checkpoint yet, the run goes on")
    (state,) = run.glob("checkpoints/step-*/state.json")
    assert json.loads(state.read_text())["ema_updates"] == STEPS


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_steps_that_are_not_finite_are_skipped_and_written_down(runs, strategy):
    expected, found = (lines_of(runs / run / "skipped.jsonl") for run in ("one/ddp", f"two/{strategy}"))
    assert [line["step"] for line in found] == list(INJURIES)
    assert found[0]["loss"] == "nan"
    assert found[1]["loss"] == "inf"
    assert float(found[2]["loss"]) == pytest.approx(float(expected[2]["loss"]), rel=TOLERANCE)
    assert found[2]["grad_norm"] in ("nan", "inf")
    assert [line["samples"] for line in found] == [line["samples"] for line in expected]
    assert [len(set(line["samples"])) for line in found] == [16, 16, 16]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines()]


@pytest.mark.parametrize("strategy", [*STRATEGIES, "fsdp-moved"])
def test_losses_norms_and_averages_equal_those_of_one_process(runs, strategy):
    expected, found = ranks.metrics(runs / "one" / "ddp"), ranks.metrics(runs / "two" / strategy)
    assert len(expected) == STEPS + 2 - len(INJURIES)
    for line, reference in zip(found, expected, strict=True):
        assert line.pop("split", None) == reference.pop("split", None)
        assert line == pytest.approx(reference, rel=TOLERANCE)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bf16_is_near_fp32_and_is_not_fp32(runs, strategy):
    fp32, bf16 = (ranks.metrics(runs / "two" / f"{strategy}{suffix}") for suffix in ("", "-bf16"))
    assert len(bf16) == len(fp32)
    for name, tolerance in (("loss", BF16_TOLERANCE), ("lr", 0)):
        expected = [line[name] for line in fp32 if name in line]
        assert [line[name] for line in bf16 if name in line] == pytest.approx(expected, rel=tolerance)
    assert bf16[1]["grad_norm"] != pytest.approx(fp32[1]["grad_norm"], rel=TOLERANCE)


@pytest.mark.parametrize("run", ["one/ddp", *(f"two/{strategy}" for strategy in STRATEGIES)])
def test_a_stopped_run_resumes_bitwise(runs, run):
    whole, resumed = runs / f"{run}-whole", runs / f"{run}-resumed"
    assert ranks.metrics(resumed) == ranks.metrics(whole)
    for weights in WEIGHTS:
        assert (resumed / weights).read_bytes() == (whole / weights).read_bytes()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_follows_the_schedule_of_its_recipe(runs, strategy):
    """A step of warm-up, a cosine of 7 that moves with the epoch of 5, and 2 of cool-down."""
    rates = [line["lr"] for line in ranks.metrics(runs / "two" / f"{strategy}-resumed") if "lr" in line]
    section = recipe_of(Path(), runs, STOPPED_STEPS).schedule
    second = section.min_lr + (section.lr - section.min_lr) / 2 * (1 + math.cos(math.pi * 4 / 7))
    assert rates == pytest.approx([section.warmup_lr, *[section.lr] * 4, *[second] * 3, 1e-5, 1e-5], rel=1e-12)
