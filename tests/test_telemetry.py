"""What one sees of a run beside its metrics: figures, pictures, profiles, Weights & Biases."""

import gzip
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from board import Board
from strategies import place, recipe_of

from pipeline.augment.device import denormalise, normalise
from pipeline.backend import start as join
from pipeline.backend.tracking import check_installed, open_trackers
from pipeline.prepare import prepare
from pipeline.recipe import Augment, Model, Recipe
from pipeline.telemetry.flops import forward_flops
from pipeline.telemetry.pictures import AugmentedSamples, sheet
from pipeline.telemetry.profile import Profile
from pipeline.trainer import fit, leave
from shards.errors import UserError

PRETRAIN = "recipes/pretrain_21k.py"
WATCHED = ["--runtime.norms", "--runtime.peak-tflops", "0.5"]
NORM = "train/grad_norm/"
CHEAP, DEAR = ("fsdp", "zero2"), ("ddp", "zero1", "zero3")


@pytest.fixture
def watched(start, small, tmp_path):
    """A run of 8 steps with everything that can be seen, on one process: its directory, and what it printed."""
    run_dir = tmp_path / "watched"
    seen = [*WATCHED, "--profile", "2", "--wandb", "vittm-tests", "--run-dir", str(run_dir)]
    ended = start(PRETRAIN, ["--debug", *small, *seen], WANDB_MODE="offline").wait()
    assert ended.codes == [0], ended.outputs
    return run_dir, ended.outputs[0]


def test_a_watched_run(watched, start, small, tmp_path):
    run_dir, output = watched
    alone = ["--debug", *small, "--runtime.no-pictures", "--run-dir", str(tmp_path / "alone")]
    assert start(PRETRAIN, alone).wait().codes == [0]
    assert ranks.metrics(run_dir) == ranks.metrics(tmp_path / "alone"), "to be watched changed what was computed"
    assert not {"samples", "attention/read", NORM + "head.weight"} & Board(tmp_path / "alone").names()
    board = Board(run_dir)
    check_figures(board, run_dir)
    assert list(board.pictures("samples")) == [1, 5]
    assert list(board.pictures("attention/read")) == list(board.pictures("attention/write")) == [4, 8]
    check_profile(run_dir / "profile", output)
    check_wandb(run_dir)


def check_figures(board: Board, run_dir: Path) -> None:
    recipe, lines = json.loads((run_dir / "recipe.json").read_text()), (run_dir / "metrics.jsonl").read_text()
    speed = {line["step"]: line["images_per_second"] for line in map(json.loads, lines.splitlines()) if "loss" in line}
    model = Model(**{name.removeprefix("model."): value for name, value in recipe.items() if name.startswith("model.")})
    flops = forward_flops(Recipe(model=model, augment=Augment(image_size=recipe["augment.image_size"])), 5, 16)
    rate, mfu = board.curve("train/images_per_second_per_gpu"), board.curve("train/mfu")
    assert rate == pytest.approx(speed, rel=1e-6)
    assert mfu == pytest.approx({step: value * 3 * flops / 0.5e12 for step, value in speed.items()}, rel=1e-5)
    assert all(0.1 < value < 8 for value in board.curve("train/memory_gib").values())
    goodput = board.curve("train/goodput")
    assert all(0 < value < 1 for value in goodput.values())
    squares = [board.curve(name) for name in board.names() if name.startswith(NORM)]
    for step, total in board.curve("train/grad_norm").items():
        assert math.hypot(*(curve[step] for curve in squares)) == pytest.approx(total, rel=1e-6)


def check_profile(directory: Path, output: str) -> None:
    trace = json.loads(gzip.decompress((directory / "rank-0.json.gz").read_bytes()))
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert len([name for name in names if name.startswith("ProfilerStep#")]) >= 2
    assert {name for name in names if name.startswith("ProfilerStep#")} == {"ProfilerStep#3", "ProfilerStep#4"}
    assert "aten::addmm" in names
    assert sum(name.startswith("Optimizer.step#AdamW") for name in names) >= 2
    assert "aten::addmm" in (directory / "rank-0.txt").read_text()
    assert "Self CPU time total" in output


def check_wandb(run_dir: Path) -> None:
    kept = (run_dir / "wandb.id").read_text()
    (run,) = (run_dir / "wandb").glob("offline-run-*")
    assert run.name.endswith(kept)
    content = (run / f"run-{kept}.wandb").read_bytes()
    for name in (b"train/loss", b"train/mfu", b"val/memory_top1", b"samples", b"data.global_batch"):
        assert name in content, name


def track_twice(run_dir: Path) -> None:
    world = join("cpu")
    os.environ["WANDB_MODE"] = "offline"
    for _ in range(2):
        trackers = open_trackers("vittm-tests", run_dir, {"seed": 0}, world)
        assert len(trackers) == world.is_main
        for tracker in trackers:
            tracker.scalars(1, {"train/loss": 2.0})
            tracker.finish()
    leave(0)


def test_weights_and_biases_goes_on_as_the_same_run(tmp_path):
    ended = ranks.run_function(track_twice, (tmp_path,), tmp_path / "logs", 2).wait()
    assert ended.codes == [0, 0], "\n".join(ended.outputs)
    # Not the directory's name: wandb adds a number to that of a second one that begins in the same second.
    runs = [path.stem.removeprefix("run-") for path in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")]
    assert runs == [(tmp_path / "wandb.id").read_text()] * 2


def test_weights_and_biases_that_knows_no_key(start, small, tmp_path):
    options = ["--debug", *small, "--wandb", "p", "--run-dir", str(tmp_path / "run")]
    ended = start(PRETRAIN, options, 2, HOME=str(tmp_path), NETRC=str(tmp_path / "none"), WANDB_MODE="online").wait()
    assert ended.codes == [2, 2], "\n".join(ended.outputs)
    for output in ended.outputs:
        assert re.search(
            r"error: wandb 'p' cannot be opened \((.|\n)*call `wandb login`, set WANDB_MODE=offline", output
        )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_weights_and_biases_that_is_not_installed(tmp_path, alone, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as Python itself notes that there is no such module
    with pytest.raises(
        UserError, match=r"wandb 'p' needs the package wandb, .*: pip install '\.\[wandb\]' --constraint"
    ):
        check_installed("p")
    assert open_trackers("", tmp_path, {}, alone) == []


def test_a_profile_that_does_not_fit(start, small, tmp_path, alone):
    ended = start(PRETRAIN, ["--debug", *small, "--profile", "6", "--run-dir", str(tmp_path)]).wait()
    assert ended.codes == [2]
    text = "profile 6 traces as many steps after 3 others, but only 8 steps are left to train: give --profile 5 or less"
    assert text in ended.outputs[0]
    for steps, left in ((0, 1), (5, 8), (5, 0)):
        Profile(steps, tmp_path, alone).check(left)
    with pytest.raises(UserError, match="profile 1 leaves 3 steps out, and only 2 are left to train: give none"):
        Profile(1, tmp_path, alone).check(2)


def watch_each(strategies: tuple[str, ...], data: Path, root: Path) -> None:
    """Two steps under each strategy, in one launch; on one process the first step's gradient norms, by hand."""
    world = join("cpu")
    for strategy in strategies:
        options = [*WATCHED, "--evaluation.every", "100%", "--runtime.log-every", "1 steps"]
        recipe = recipe_of(data, root / strategy, 2, options)
        assert fit(recipe, place(world, strategy, root)) == "done"
    if world.size == 1:
        options = ["--runtime.compile", "aot_eager", "--evaluation.every", "100%"]
        assert fit(recipe_of(data, root / "compiled", 2, options), world) == "done"
        by_hand(recipe_of(data, root / "by-hand", 2), world, root / "norms.json")
    leave(0)


def by_hand(recipe: Recipe, world, path: Path) -> None:
    run = prepare(recipe, world)
    model = run.learner.backend.module
    with run.input.stream.open(0, 1) as batches:
        mixed = [run.input.augment(batch) for batch in next(batches)]
    loss = sum(run.learner.criterion(model(images), targets) for images, targets in mixed) / len(mixed)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    path.write_text(json.dumps({name: each.norm().item() for name, each in zip(names, gradients, strict=True)}))


@pytest.mark.parametrize("strategies", [CHEAP, pytest.param(DEAR, marks=pytest.mark.soak)], ids=str)
def test_under_every_strategy(shards, tmp_path, strategies):
    """Norms of parameters that lie in pieces, and maps of models that no rank has whole."""
    both = [
        ranks.run_function(watch_each, (("ddp",), shards, tmp_path / "one"), tmp_path / "logs" / "one", 1),
        ranks.run_function(watch_each, (strategies, shards, tmp_path / "two"), tmp_path / "logs" / "two", 2),
    ]
    for running in both:
        ended = running.wait()
        assert ended.codes == [0] * len(ended.codes), "\n".join(ended.outputs)
    expected = json.loads((tmp_path / "one" / "norms.json").read_text())
    one = Board(tmp_path / "one" / "ddp")
    for board in (one, *(Board(tmp_path / "two" / strategy) for strategy in strategies)):
        names = {name.removeprefix(NORM) for name in board.names() if name.startswith(NORM)}
        assert names == expected.keys()
        assert {name: board.curve(NORM + name)[1] for name in names} == pytest.approx(expected, rel=1e-4, abs=1e-7)
        for picture in ("attention/read", "attention/write"):
            drawn, same = board.pictures(picture)[2].astype(int), one.pictures(picture)[2].astype(int)
            assert drawn.shape == same.shape
            assert np.abs(drawn - same).mean() < 0.5
    drawn = Board(tmp_path / "one" / "compiled").pictures("attention/read")[2].astype(int)
    assert np.abs(drawn - one.pictures("attention/read")[2]).mean() < 0.5
    picture = one.pictures("samples")[1]
    for strategy in strategies:
        half = Board(tmp_path / "two" / strategy).pictures("samples")[1]
        assert (half[: len(half) // 2] == picture[: len(half) // 2]).all(), "rank 0 begins with the same samples"


def test_goodput_counts_what_was_lost(start, small, tmp_path):
    """A run that is killed after its last checkpoint loses the steps since then, and the time until it is started."""
    options = ["--debug", *small, "--checkpoint.every", "4 steps", "--evaluation.every", "100%"]
    options += ["--schedule.length", "30 steps", "--run-dir", str(tmp_path / "run")]
    options += ["--checkpoint.no-asynchronous"]  # so that step 4 is committed before step 5 is logged
    running = start(PRETRAIN, options)
    ranks.when_logged(tmp_path / "run" / "metrics.jsonl", 7, running.processes[0].is_alive)
    running.kill()
    ended = start(PRETRAIN, options).wait()
    assert ended.codes == [0], ended.outputs
    attempts = [json.loads(line) for line in (tmp_path / "run" / "attempts.jsonl").read_text().splitlines()]
    assert [attempt["step"] for attempt in attempts] == [0, attempts[1]["step"]]
    assert attempts[1]["step"] >= 4
    (state,) = (tmp_path / "run" / "checkpoints").glob("step-00000030/state.json")
    kept = json.loads(state.read_text())["kept_seconds"]
    curve = Board(tmp_path / "run").curve("train/goodput")
    assert curve[30] * (state.stat().st_mtime - attempts[0]["started"]) == pytest.approx(kept, rel=0.2)
    spent = attempts[1]["started"] - attempts[0]["started"]
    assert curve[30] < 1 - 0.5 * spent / (state.stat().st_mtime - attempts[0]["started"])


@pytest.mark.parametrize(
    ("model", "macs"),
    [(Model(name="vit_base_patch16_224"), 17.58e9), (Model(name="vittm_base", memory_ps=28, process_ps=28), 7.084e9)],
)
def test_flops(model, macs):
    """timm's own count of the ViT (its results table), and the count that tests/models/test_vittm_cost.py has."""
    assert forward_flops(Recipe(model=model), 1000, batch=2) == pytest.approx(2 * macs, rel=0.01)


def test_pictures_show_what_the_model_is_given():
    images = torch.arange(256, dtype=torch.uint8).repeat(3, 3).reshape(1, 3, 16, 48)
    assert (denormalise(normalise(images)) == images).all()


def test_samples_are_named_by_the_shares_that_are_worth_it():
    """Smoothing gives every class some; of a thousand classes too little to be told."""
    targets = torch.full((2, 1000), 1e-4)
    targets[0, 3], targets[1, 3], targets[1, 7] = 0.9, 0.6, 0.3
    images, shown = torch.zeros(2, 3, 8, 8), []
    samples = AugmentedSamples(lambda *given: shown.append(given), [f"c{label}" for label in range(1000)], every=1)
    samples(1, (images, targets))
    pixels = denormalise(images).permute(0, 2, 3, 1).numpy()
    ((step, name, picture),) = shown
    assert (step, name) == (1, "samples")
    np.testing.assert_array_equal(picture, sheet(pixels, ["0.90 c3", "0.60 c3\n0.30 c7"]))
