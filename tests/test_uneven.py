"""Three ranks, which do not divide the global batch of 16, go on with what four began: the training of one process.

Their shares are 6, 6 and 4 samples, in two micro-batches of 4 and 2, or of 2 and 2; mixing and clipping are on. Whole
runs on three ranks are in tests/test_soak_backends.py.
"""

import copy
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file
from strategies import INJURIES, Injured, fit_injured, place, recipe_of, stop, train_injured
from torch import nn
from torch.nn import functional as F

from pipeline.backend import StepOptions, World, start, wrap
from pipeline.prepare import prepare
from pipeline.trainer import leave
from shards.layout import Layout

STEPS, STOPPED_AFTER = 8, 4
STRATEGIES = ("ddp", "fsdp")
AT_THE_END = ["--checkpoint.every", "100%", "--evaluation.every", "100%"]
TOLERANCE = 1e-5
BATCH, ACCUMULATION = 16, 2


def fit_each(data: Path, root: Path) -> None:
    """What the launch of this many ranks does: one trains alone, four begin runs, and three go on with them."""
    world = start("cpu")
    if world.size == 1:
        fit_injured(recipe_of(data, root / "alone", STEPS, AT_THE_END), world)
    for strategy in STRATEGIES if world.size > 1 else ():
        placed, recipe = place(world, strategy, root), recipe_of(data, root / strategy, STEPS, AT_THE_END)
        if world.size == 4:
            stop(recipe, placed, STOPPED_AFTER, Injured)
        else:
            run = prepare(recipe, placed)
            assert run.progress.start == STOPPED_AFTER
            train_injured(run)
            run.learner.backend.close()
            check_gradient(placed)
    leave(0)


def check_gradient(world: World) -> None:
    """A step of plain descent at a rate of 1 moves the weights by the gradient of the undivided batch's mean loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    images, targets = torch.randn(BATCH, 6), torch.randn(BATCH, 3).softmax(dim=1)
    undivided = copy.deepcopy(model)
    loss = F.cross_entropy(undivided(images), targets)
    loss.backward()
    expected = {name: parameter.grad for name, parameter in undivided.named_parameters()}
    options = StepOptions(BATCH, ACCUMULATION)
    backend = wrap(world, model, lambda module: torch.optim.SGD(module.parameters(), lr=1.0), options)
    parts = Layout(BATCH, world.size, ACCUMULATION).micro_batches(world.rank)
    stepped = backend.step(F.cross_entropy, [(images[part], targets[part]) for part in parts])
    moved = backend.full_weights()
    assert stepped.loss.item() == pytest.approx(loss.item(), rel=TOLERANCE)
    norm = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in expected.values()]))
    assert stepped.grad_norm.item() == pytest.approx(norm.item(), rel=TOLERANCE)
    if world.is_main:
        found = {name: parameter - moved[name] for name, parameter in undivided.named_parameters()}
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=1e-7)
    backend.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, shards):
    root = tmp_path_factory.mktemp("uneven")
    for size in (1, 4, 3):
        ended = ranks.run_function(fit_each, (shards, root), root / "logs", size).wait()
        assert set(ended.codes) == {0}, "\n".join(ended.outputs)
    return root


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_losses_norms_and_averages_equal_those_of_one_process(runs, strategy):
    expected, found = ranks.metrics(runs / "alone"), ranks.metrics(runs / strategy)
    assert len(expected) == STEPS + 1 - len(INJURIES)
    for line, reference in zip(found, expected, strict=True):
        assert line.pop("split", None) == reference.pop("split", None)
        assert line == pytest.approx(reference, rel=TOLERANCE)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_averages_are_near_those_of_one_process(runs, strategy):
    expected, found = (load_file(runs / name / "weights" / "ema.safetensors") for name in ("alone", strategy))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_skipped_steps_name_the_samples_in_the_order_of_the_global_batch(runs, strategy):
    expected, found = ((runs / name / "skipped.jsonl").read_text().splitlines() for name in ("alone", strategy))
    assert len(expected) == len(INJURIES)
    assert [line.partition('"samples"')[2] for line in found] == [line.partition('"samples"')[2] for line in expected]
