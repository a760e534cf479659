"""Training against an information bottleneck: its statistics, on one rank and on two, and runs that are resumed."""

import dataclasses
import math
import shutil
from pathlib import Path

import pytest
import ranks
import torch
from board import Board
from safetensors.torch import load_file, save_file
from strategies import place

from pipeline import backend
from pipeline.bottleneck.kmeans import Share, kmeans
from pipeline.models.ltm_loss import class_profile, soft_assign
from pipeline.prepare import prepare
from pipeline.recipe import Bottleneck, Progressive, Recipe, TokenExpansion
from pipeline.trainer import fit, leave
from pipeline.validate import validate
from recipes import toe_deit
from shards.errors import UserError

STEPS_AN_EPOCH, STEPS = 5, 13
STRATEGIES = ("ddp", "fsdp", "zero2")
FOUND = Bottleneck(weight=0.5, after="1 epochs", centroids=7, iterations=9, samples=75)


def small(data: Path, run_dir: Path, **changed: object) -> Recipe:
    """A DeiT without masks inside, for three epochs, the first without the bottleneck."""
    made = toe_deit.make("deit_tiny_patch16_224", True)
    plain = dataclasses.replace(made.augment, mixup=False, cutmix=False, image_size=16)
    model = dataclasses.replace(made.model, embed_dim=24, depth=2, num_heads=2, patch_size=8, drop_path_rate=0.0)
    given = {
        "run_dir": str(run_dir),
        "data": dataclasses.replace(made.data, path=str(data), global_batch=16, workers=0, accumulation=2),
        "augment": plain,
        "model": model,
        "token_expansion": TokenExpansion(),
        "bottleneck": FOUND,
        "schedule": dataclasses.replace(made.schedule, length=f"{STEPS} steps", warmup="1 steps"),
        "checkpoint": dataclasses.replace(made.checkpoint, every="4 steps", keep=9),
        "evaluation": dataclasses.replace(made.evaluation, every="100%", batch=8),
        "runtime": dataclasses.replace(made.runtime, log_every="1 steps", activation_checkpointing=1),
    }
    return dataclasses.replace(made, **given | changed)


def look(recipe: Recipe, world: backend.World, to: Path) -> None:
    """What is found before the first step, into a file of this rank; a signal ends the search on every rank."""
    run = prepare(recipe, world)
    with run.record.open(0, STEPS):
        assert run.bottleneck(0)
        loss = run.learner.criterion
        for step, is_on in ((STEPS_AN_EPOCH - 1, False), (STEPS_AN_EPOCH + 1, True)):
            assert run.bottleneck(step)
            assert loss.is_on == is_on
        world.stop.raised = world.rank == world.size - 1  # as by a signal to one rank
        assert not run.bottleneck(0)
        world.stop.raised = False
    found = {name: getattr(loss, name) for name in ("pixels", "features", "profile")}
    save_file(found, to.with_suffix(f".{world.rank}"))
    run.learner.backend.close()


def train_each(data: Path, root: Path) -> None:
    world = backend.start("cpu")
    name = f"{world.size}"
    look(small(data, root / f"look-{name}"), world, root / f"found-{name}")
    if world.size == 1:
        damage(data, root / "damaged")
        look(small(root / "damaged", root / "look-damaged"), world, root / "found-damaged")
        strategies = ("ddp",)
    else:
        strategies = STRATEGIES
    for strategy in strategies:
        run_dir = root / f"{strategy}-{name}"
        assert fit(small(data, run_dir), place(world, strategy, root / "configs")) == "done"
    if world.size == 1:
        fit(small(data, root / "looked-at", dry_run=True), world)
        shutil.copytree(root / "ddp-1", root / "resumed")
        for step in (12, STEPS):
            shutil.rmtree(root / f"resumed/checkpoints/step-{step:08d}")
        assert fit(small(data, root / "resumed"), world) == "done"
    leave(0)


def damage(data: Path, to: Path) -> None:
    """A copy of the shards whose first image is none."""
    shutil.copytree(data, to)
    tar = sorted(to.glob("train-*.tar"))[0]
    content = bytearray(tar.read_bytes())
    start = content.index(b"\xff\xd8\xff")
    content[start : start + 200] = bytes(200)
    tar.write_bytes(content)


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where the runs of one rank and of two are, and what the former printed."""
    root = tmp_path_factory.mktemp("bottleneck")
    ended = [ranks.run_function(train_each, (shards, root), root / "logs", size).wait() for size in (1, 2)]
    assert [each.codes for each in ended] == [[0], [0, 0]], [each.outputs for each in ended]
    return root, ended[0].outputs[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_statistics_are_the_same_on_one_rank_and_on_two(trained, rank):
    one, two = load_file(trained[0] / "found-1.0"), load_file(trained[0] / f"found-2.{rank}")
    torch.testing.assert_close(two, one, rtol=0, atol=0)
    assert one["features"].norm(dim=1).tolist() == pytest.approx([1] * FOUND.centroids, abs=1e-6)
    assert one["pixels"].norm(dim=1).tolist() == pytest.approx([1] * FOUND.centroids, abs=1e-6)
    assert one["profile"].sum(dim=0).tolist() == pytest.approx([1] * 5, abs=1e-6)


def test_an_unreadable_image_is_left_out(trained):
    one, damaged = load_file(trained[0] / "found-1.0"), load_file(trained[0] / "found-damaged.0")
    assert damaged["profile"].sum(dim=0).tolist() == pytest.approx([1] * 5, abs=1e-6)
    assert not torch.equal(damaged["profile"], one["profile"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_trains_the_same(trained, strategy):
    alone, together = (ranks.metrics(trained[0] / name) for name in ("ddp-1", f"{strategy}-2"))
    losses, others = ([line["loss"] for line in lines if "split" not in line] for lines in (alone, together))
    assert len(losses) == STEPS
    assert others == pytest.approx(losses, rel=1e-5)
    boards = [Board(trained[0] / name) for name in ("ddp-1", f"{strategy}-2")]
    for curve in ("pixels", "labels", "difference"):
        found, other = (board.curve(f"information/{curve}") for board in boards)
        assert [*found] == [0, 5, 10]
        assert other == pytest.approx(found, rel=1e-3, abs=1e-6)


def test_the_bottleneck_is_in_the_loss_from_its_epoch_on(trained):
    """Of five classes told by chance; half of its bound, log K - log K at first, comes on top of that."""
    losses = [line["loss"] for line in ranks.metrics(trained[0] / "ddp-1") if "split" not in line]
    assert losses == pytest.approx([math.log(5)] * STEPS, abs=0.15)


def test_a_run_that_is_killed_within_an_epoch_ends_with_the_same_weights(trained):
    for name in ("model", "ema"):
        whole, again = (load_file(trained[0] / run / f"weights/{name}.safetensors") for run in ("ddp-1", "resumed"))
        torch.testing.assert_close(again, whole, rtol=0, atol=0)
    assert ranks.metrics(trained[0] / "resumed") == ranks.metrics(trained[0] / "ddp-1")


def test_information_is_told_and_a_dry_run_tells_the_memory(trained):
    """Centroids of 768 pixels and of 24 features, and profiles of 5 classes."""
    assert "step 5  information of features on pixels 0." in trained[1]
    kept = FOUND.centroids * (768 + 24 + 5) * 4 / 1024
    assert f"clusters of the bottleneck, added to activations below: {kept:,.1f} KiB" in trained[1]


def test_clusters_that_are_there_are_found(alone):
    """Three directions, with noise; the first centroids are all of the first."""
    torch.manual_seed(0)
    directions = torch.eye(3, 8).repeat_interleave(200, dim=0)
    rows = directions * torch.rand(600, 1).add(0.5) + 0.05 * torch.randn(600, 8)
    found = kmeans(Share(alone, rows, torch.Tensor.float), 3, 50)
    torch.testing.assert_close(found, torch.eye(3, 8), rtol=0, atol=0.02)
    profile = class_profile(soft_assign(rows, found, 50.0), torch.arange(3).repeat_interleave(200), 3)
    torch.testing.assert_close(profile, torch.eye(3), rtol=0, atol=1e-3)


def test_a_cluster_that_nothing_is_near_to_stays(alone):
    rows = torch.tensor([[1.0, 0]]).repeat(4, 1)
    found = kmeans(Share(alone, rows, torch.Tensor.float), 2, 5)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0], [1, 0]]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"bottleneck": dataclasses.replace(FOUND, after="3 epochs")}, "'3 epochs' is 3 whole epochs of 5 steps, but"),
        ({"bottleneck": dataclasses.replace(FOUND, centroids=90, samples=90)}, "split 'train' has only 80 samples"),
        ({"model": dataclasses.replace(toe_deit.debug("deit_tiny_distilled_patch16_224").model)}, "one linear class"),
    ],
)
def test_refuses_before_the_first_step(shards, tmp_path, changed, words):
    ended = ranks.run_function(refuse, (shards, tmp_path, changed, words), tmp_path / "logs", 1).wait()
    assert ended.codes == [0], ended.outputs


def refuse(data: Path, root: Path, changed: dict, words: str) -> None:
    world = backend.start("cpu")
    with pytest.raises(UserError) as caught:
        prepare(small(data, root / "run", **changed), world)
    assert words in str(caught.value)
    leave(0)


def test_refuses_with_the_other_errors_of_the_recipe(shards, tmp_path):
    made = small(shards, tmp_path / "run", loss="bce", bottleneck=dataclasses.replace(FOUND, samples=6, iterations=0))
    mixed = dataclasses.replace(
        made,
        augment=dataclasses.replace(made.augment, mixup=True),
        progressive=Progressive(steps=(0, 1), image_sizes=(8, 16)),
    )
    with pytest.raises(UserError) as caught:
        validate(mixed)
    lines = str(caught.value).splitlines()[1:]
    assert [line.split()[1] for line in lines] == [
        "bottleneck.iterations",
        "bottleneck.samples",
        *["bottleneck.weight"] * 3,
    ]
    assert "one label each: set augment.mixup and augment.cutmix to False" in lines[2]
    assert "leave progressive.image_sizes empty" in lines[3]
    assert "loss is 'bce': set it to ce" in lines[4]
