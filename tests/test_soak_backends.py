"""`make soak`: every strategy at accumulation 1 and 4, on two and on four ranks (DDP and FSDP2 on three, too, which do
not divide the batch), with everything the runs in tests/test_backends.py leave out."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file
from strategies import (
    SPIKE,
    WATCHED,
    ZERO,
    Injured,
    Spiked,
    Whole,
    check_cut,
    check_reads,
    fit_injured,
    half_of,
    place,
    recipe_of,
)

from pipeline.backend import start
from pipeline.prepare import prepare
from pipeline.trainer import fit, leave, train

pytestmark = pytest.mark.soak
STEPS = 20
REPLICAS = "fsdp-2x2"
UNEVEN = ("ddp", "fsdp")
STRATEGIES = (*UNEVEN, *ZERO)
TOLERANCE = 1e-5


def options_of(strategy: str, accumulation: int) -> list[str]:
    replicas = ["--runtime.fsdp-replicas", "2"] if strategy == REPLICAS else []
    return ["--data.global-batch", "32", "--data.accumulation", str(accumulation), *replicas]


def fit_each(strategies: tuple[str, ...], accumulation: int, data: Path, root: Path, alone: Path) -> None:
    """Per strategy a run, begun with the averages of the run `alone`, and again from the checkpoint in its middle."""
    world = start("cpu")
    for strategy in strategies:
        placed, options = place(world, strategy.partition("-")[0], root), options_of(strategy, accumulation)
        run = prepare(recipe_of(data, root / strategy, STEPS, options), placed)
        check_cut(run)
        if world.size > 1:
            check_reads(run, alone)
        assert train(run) == "done"
        run.learner.backend.close()
        assert fit(recipe_of(data, half_of(root / strategy, world), STEPS, options), placed) == "done"
    leave(0)


def run_on(size: int, root: Path, *arguments: object) -> None:
    ended = ranks.run_function(fit_each, arguments, root / "logs", size).wait()
    assert set(ended.codes) == {0}, "\n".join(ended.outputs)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(("size", "strategies"), [(2, STRATEGIES), (3, UNEVEN), (4, (*STRATEGIES, REPLICAS))])
def test_every_strategy_trains_alike_and_resumes_bitwise(shards, tmp_path, accumulation, size, strategies):
    alone = tmp_path / "one" / "ddp"
    run_on(1, tmp_path, ("ddp",), accumulation, shards, tmp_path / "one", alone)
    run_on(size, tmp_path, strategies, accumulation, shards, tmp_path / "many", alone)
    expected = ranks.metrics(alone)
    assert len(expected) == STEPS + 2
    for strategy in strategies:
        found = ranks.metrics(tmp_path / "many" / strategy)
        assert ranks.metrics(tmp_path / "many" / f"{strategy}-resumed") == found
        worst = max(difference(*lines) for lines in zip(found, expected, strict=True))
        print(f"\n{size} ranks, accumulation {accumulation}, {strategy}: {worst:.1e} from one process at most")
        assert worst < TOLERANCE


def fit_spiked(strategies: tuple[str, ...], data: Path, root: Path) -> None:
    world = start("cpu")
    for strategy in strategies:
        fit_injured(recipe_of(data, root / strategy, STEPS, WATCHED), place(world, strategy, root), Spiked)
    leave(0)


def test_every_strategy_goes_back_when_the_loss_spikes(shards, tmp_path):
    for size, strategies, root in ((1, ("ddp",), tmp_path / "one"), (2, STRATEGIES, tmp_path / "two")):
        ended = ranks.run_function(fit_spiked, (strategies, shards, root), tmp_path / "logs", size).wait()
        assert set(ended.codes) == {0}, "\n".join(ended.outputs)
    expected = ranks.metrics(tmp_path / "one" / "ddp")
    for strategy in STRATEGIES:
        assert "step-00000010 again" in (tmp_path / "two" / strategy / "skipped.jsonl").read_text()
        found = ranks.metrics(tmp_path / "two" / strategy)
        worst = max(difference(*lines) for lines in zip(found, expected, strict=True) if lines[0]["step"] > SPIKE)
        print(f"\nspiked, {strategy}: {worst:.1e} from one process at most")
        assert worst < TOLERANCE


@dataclass(frozen=True)
class Variant:
    """Options under which `strategies` train alike, up to a relative difference of the losses."""

    options: str
    tolerance: float
    strategies: tuple[str, ...] = STRATEGIES


UNCOMPILED = ("zero3",)
COMPILED = tuple(strategy for strategy in STRATEGIES if strategy not in UNCOMPILED)
VARIANTS = {
    "recomputed": Variant("--runtime.activation-checkpointing 2", 1e-5),
    "compiled": Variant("--runtime.compile aot_eager", 1e-5, COMPILED),
    "compiled-recomputed": Variant("--runtime.compile aot_eager --runtime.activation-checkpointing 1", 1e-5, COMPILED),
    "inductor": Variant("--runtime.compile inductor", 1e-4, ("ddp", "fsdp")),
    "bf16": Variant("--runtime.precision bf16", 2e-3),
    "bf16-compiled": Variant("--runtime.precision bf16 --runtime.compile aot_eager", 2e-3, COMPILED),
    "bf16-pure": Variant("--runtime.precision bf16-pure", 2e-3),
    "bf16-pure-recomputed": Variant("--runtime.precision bf16-pure --runtime.activation-checkpointing 1", 2e-3),
    "fp16": Variant("--runtime.precision fp16", 2e-3, ("ddp",)),
}


def fit_variant(variant: Variant, strategies: tuple[str, ...], data: Path, root: Path) -> None:
    """Per strategy an injured run without and with the options, and the latter again from its middle checkpoint. In
    fp16 none is injured: a step whose gradients are no numbers is computed again there, at half the scale."""
    world, kind = start("cpu"), Whole if "fp16" in variant.options else Injured
    for strategy in strategies:
        placed, options = place(world, strategy, root), variant.options.split()
        fit_injured(recipe_of(data, root / f"{strategy}-plain", STEPS), placed, kind)
        fit_injured(recipe_of(data, root / strategy, STEPS, options), placed, kind)
        assert fit(recipe_of(data, half_of(root / strategy, world), STEPS, options), placed) == "done"
    leave(0)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_train_alike_and_resume_bitwise(shards, tmp_path, name, size):
    variant = VARIANTS[name]
    strategies = tuple(each for each in variant.strategies if size == 2 or each in UNEVEN)
    ended = ranks.run_function(fit_variant, (variant, strategies, shards, tmp_path), tmp_path / "logs", size).wait()
    assert set(ended.codes) == {0}, "\n".join(ended.outputs)
    for strategy in strategies:
        found, plain = ranks.metrics(tmp_path / strategy), ranks.metrics(tmp_path / f"{strategy}-plain")
        assert ranks.metrics(tmp_path / f"{strategy}-resumed") == found
        losses = [[line for line in lines if "split" not in line] for lines in (found, plain)]
        worst = max(abs(line["loss"] / other["loss"] - 1) for line, other in zip(*losses, strict=True))
        print(f"\n{name}, {strategy} on {size} ranks: losses are within {worst:.1e} of those without")
        assert worst < variant.tolerance
        weights = load_file(tmp_path / strategy / "weights" / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def difference(line: dict, reference: dict) -> float:
    """The largest relative difference between two lines of metrics."""
    assert line.keys() == reference.keys()
    numbers = [name for name, value in reference.items() if isinstance(value, float)]
    return max(abs(line[name] - reference[name]) / max(abs(reference[name]), 1e-12) for name in numbers)
