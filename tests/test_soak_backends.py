"""`make soak`: every strategy at accumulation 1 and 4, on two and on four ranks, with everything the runs in
tests/test_backends.py leave out."""

from pathlib import Path

import pytest
import ranks
from strategies import ZERO, check_cut, check_reads, half_of, place, recipe_of

from pipeline.backend import start
from pipeline.prepare import prepare
from pipeline.trainer import fit, leave, train

pytestmark = pytest.mark.soak
STEPS = 20
REPLICAS = "fsdp-2x2"
STRATEGIES = ("ddp", "fsdp", *ZERO)
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
@pytest.mark.parametrize(("size", "strategies"), [(2, STRATEGIES), (4, (*STRATEGIES, REPLICAS))])
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


def difference(line: dict, reference: dict) -> float:
    """The largest relative difference between two lines of metrics."""
    assert line.keys() == reference.keys()
    numbers = [name for name, value in reference.items() if isinstance(value, float)]
    return max(abs(line[name] - reference[name]) / max(abs(reference[name]), 1e-12) for name in numbers)
