"""Stages of image sizes and of RandAugment magnitudes: through the workers, in the model, resumed, refused.

The recipe is toe_deit's debug form of the variant efficienttrain, small, whose tokens expand by stages, too.
"""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import ranks
import timm
import torch
from board import Board
from safetensors.torch import load_file
from test_toe_deit_recipe import BEGINS, MAGNITUDES, PEAK, SIDES, STEPS, STEPS_AN_EPOCH, small

from pipeline import backend
from pipeline.data.stream import evaluation_batches
from pipeline.models.build import make_model
from pipeline.models.stages import check_image_sizes
from pipeline.prepare import make_input, prepare
from pipeline.recipe import Model, Progressive, Recipe, TokenExpansion
from pipeline.report.cost import cost_of
from pipeline.status import read_facts
from pipeline.telemetry.flops import FORWARDS_A_STEP, Flops
from pipeline.trainer import fit, leave
from recipes import toe_deit
from shards.errors import UserError
from shards.store import open_data
from tools import export

VARIANT = "efficienttrain"


def plain(recipe: Recipe, epoch: int) -> Recipe:
    """What is trained in an epoch, as a recipe without stages."""
    augment = dataclasses.replace(
        recipe.augment, image_size=SIDES[epoch], randaugment_magnitude=MAGNITUDES[epoch], randaugment_ops=2
    )
    return dataclasses.replace(recipe, augment=augment, progressive=Progressive())


# --- the stream


@pytest.mark.parametrize(("decode", "workers"), [("exact", 1), ("fast", 0), ("fast", 2)])
def test_every_epoch_has_its_side_and_its_magnitude(shards, alone, tmp_path, decode, workers):
    """As if it were of a recipe of its own, in one memory, and wherever one enters."""
    made = small(shards, tmp_path, VARIANT)
    augment = dataclasses.replace(made.augment, decode=decode, randaugment_ops=2)
    recipe = dataclasses.replace(made, augment=augment, data=dataclasses.replace(made.data, workers=workers))
    stream = make_input(recipe, *open_data(str(shards)), alone).stream
    whole, memories = [], set()
    with stream.open(0, STEPS) as steps:
        for (batch,) in steps:
            memories.add(batch.images.untyped_storage().data_ptr())
            whole.append(batch.images.clone())
    assert len(memories) == 1
    with stream.open(STEPS_AN_EPOCH + 2, STEPS) as steps:
        entered = [batch.images.clone() for (batch,) in steps]
    assert all(map(torch.equal, whole[STEPS_AN_EPOCH + 2 :], entered))
    for epoch, side in enumerate(SIDES):
        first = epoch * STEPS_AN_EPOCH
        alike = make_input(plain(recipe, epoch), *open_data(str(shards)), alone).stream
        with alike.open(first, min(first + STEPS_AN_EPOCH, STEPS)) as steps:
            for number, (batch,) in enumerate(steps, first):
                assert whole[number].shape == (16, 3, side, side)
                assert torch.equal(whole[number], batch.images)


def test_what_is_evaluated_is_whole(shards, alone, tmp_path):
    given = make_input(small(shards, tmp_path, VARIANT), *open_data(str(shards)), alone)
    with evaluation_batches(given.validation, 8, alone, given.stream.loading) as batches:
        assert {tuple(batch.images.shape) for batch in batches} == {(8, 3, 32, 32)}


# --- the model


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_tiny_patch16_224"])
def test_whole_images_meet_the_plain_model(shards, tmp_path, name):
    made = small(shards, tmp_path, VARIANT)
    recipe = dataclasses.replace(made, model=dataclasses.replace(made.model, name=name, drop_path_rate=0.0))
    staged, fixed = make_model(recipe, 5), make_model(dataclasses.replace(recipe, progressive=Progressive()), 5)
    images = torch.randn(3, 3, 32, 32)
    found = []
    for model in (staged, fixed):
        model(images).square().sum().backward()
        found.append([(name, weight, weight.grad) for name, weight in model.named_parameters()])
    for one, other in zip(*found, strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])
        assert torch.equal(one[2], other[2])
    staged(torch.randn(2, 3, 16, 16)).sum().backward()
    assert staged.pos_embed.grad.abs().min() > 0


# --- a run


def train_each(data: Path, root: Path) -> None:
    """At once, and killed after step 8, in the middle of a stage of either kind."""
    torch.set_num_threads(1)
    world = backend.start("cpu")
    assert fit(small(data, root / "whole", VARIANT), world) == "done"
    shutil.copytree(root / "whole", root / "resumed")
    for step in (12, STEPS):
        shutil.rmtree(root / f"resumed/checkpoints/step-{step:08}")
    assert fit(small(data, root / "resumed", VARIANT), world) == "done"
    fit(small(data, root / "looked-at", VARIANT, dry_run=True), world)
    leave(0)


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where the runs are, and what was printed."""
    root = tmp_path_factory.mktemp("progressive")
    ended = ranks.run_function(train_each, (shards, root), root / "logs", 1).wait()
    assert ended.codes == [0], ended.outputs
    return root, ended.outputs[0]


def test_a_run_that_is_killed_within_a_stage_ends_with_the_same_weights(trained):
    whole, again = (load_file(trained[0] / run / "weights/model.safetensors") for run in ("whole", "resumed"))
    torch.testing.assert_close(again, whole, rtol=0, atol=0)
    lines = [ranks.metrics(trained[0] / run) for run in ("whole", "resumed")]
    assert lines[0] == lines[1]


def test_what_is_counted_follows_both_kinds_of_stages(trained, shards):
    """The logged MFU, and the operations of the page."""
    flops = Flops.of(small(shards, trained[0], VARIANT), 5, 16)
    assert [begins for begins, _ in flops.stages] == [0, *BEGINS]
    board = Board(trained[0] / "whole")
    speed, mfu = board.curve("train/images_per_second_per_gpu"), board.curve("train/mfu")
    found = {step: value / speed[step] * PEAK * 1e12 / FORWARDS_A_STEP for step, value in mfu.items()}
    expected = {step: flops.at((step - 1) // STEPS_AN_EPOCH) for step in range(1, STEPS + 1)}
    assert found == pytest.approx(expected, rel=1e-4)
    total = cost_of(read_facts(trained[0] / "whole"), None).flops
    assert total == pytest.approx(sum(expected.values()) * 16 * FORWARDS_A_STEP, rel=1e-3)


def test_a_dry_run_measures_every_stage(trained):
    found = re.findall(r"(\d+) steps of [\d.]+ s, with images of (\d+) px, which come in [\d.]+ s", trained[1])
    assert found == [("5", "16"), ("5", "24"), ("4", "32")], trained[1]


def test_what_is_exported_is_the_plain_model(trained, tmp_path):
    assert export.main([str(trained[0] / "whole"), str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "dynamic_img_size" not in str(config)
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    model = timm.create_model(config["architecture"], **config["model_args"])
    model.load_state_dict(load_file(tmp_path / "out/model.safetensors"))


# --- what is refused


@pytest.mark.parametrize(
    ("changed", "model", "message"),
    [
        (
            {"image_sizes": (16, 20, 32)},
            {},
            "progressive.image_sizes (16, 20, 32): model.name 'deit_tiny_patch16_224' cannot be trained on images of "
            "20 pixels: Input height (20) should be divisible by patch size (8); give other sizes, or leave them empty",
        ),
        (
            {"image_sizes": (8, 24, 32)},
            {},
            "cannot be trained on images of 8 pixels: initial_keep_rate 0.3 of 1 tokens is none to begin token "
            "expansion with",
        ),
        (
            {},
            {"name": "mixer_s32_224", "patch_size": None, "embed_dim": None, "depth": None, "num_heads": None},
            "progressive.image_sizes (16, 24, 32): model.name 'mixer_s32_224' takes images of one size alone: leave it "
            "empty, or take a ViT, DeiT, T2T-ViT or ViTTM",
        ),
    ],
)
def test_refuses_images_that_the_model_does_not_take(shards, alone, tmp_path, changed, model, message):
    made = small(shards, tmp_path / "run", VARIANT)
    tokens = dataclasses.replace(made.token_expansion, steps=(0, 2))
    recipe = dataclasses.replace(
        made,
        token_expansion=tokens,
        progressive=dataclasses.replace(made.progressive, **changed),
        model=dataclasses.replace(made.model, **model),
    )
    with pytest.raises(UserError) as caught:
        prepare(recipe, alone)
    assert message in str(caught.value)
    assert not [*tmp_path.glob("run/*")]


PATCHES = {"memory_ps": 4, "process_ps": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    "model",
    [
        Model("vit_tiny_patch16_224", patch_size=8, depth=2),
        Model("deit_tiny_distilled_patch16_224", patch_size=8, depth=2),
        Model("t2t_vit_7"),
        Model("vittm_tiny", rw_head_type="lin", **PATCHES),
    ],
    ids=lambda model: model.name,
)
def test_what_takes_smaller_images(shards, tmp_path, model):
    made = small(shards, tmp_path, VARIANT)
    sizes = dataclasses.replace(made.progressive, image_sizes=(16, 16, 32))
    check_image_sizes(dataclasses.replace(made, model=model, progressive=sizes, token_expansion=TokenExpansion()))


def test_vittm_refuses_them_where_weights_are_sized_by_tokens(shards, alone, tmp_path):
    made, sized = small(shards, tmp_path / "run", VARIANT), Model("vittm_tiny", rw_head_type="tl", **PATCHES)
    with pytest.raises(UserError, match=r"'vittm_tiny' cannot be trained on images of 16 pixels: .*rw_head_type"):
        prepare(dataclasses.replace(made, model=sized, token_expansion=TokenExpansion()), alone)


@pytest.mark.parametrize(
    ("length", "words"),
    [
        ("2 epochs", "the stage of epoch 2 would never begin, as schedule.length is '2 epochs', counted from 0"),
        ("10 steps", "the stage of epoch 2 would never begin, as schedule.length is 10 steps, 5 an epoch"),
    ],
)
def test_refuses_a_stage_that_never_begins(shards, alone, tmp_path, length, words):
    made = small(shards, tmp_path / "run", VARIANT)
    schedule = dataclasses.replace(made.schedule, length=length)
    with pytest.raises(UserError) as caught:
        prepare(dataclasses.replace(made, token_expansion=TokenExpansion(), schedule=schedule), alone)
    assert f"progressive.steps (0, 1, 2): {words}" in str(caught.value)


def test_the_variant_is_efficienttrains():
    recipe = toe_deit.make("deit_small_patch16_224", False, VARIANT)
    assert recipe.run_dir != toe_deit.make("deit_small_patch16_224", False).run_dir
    assert (recipe.data.global_batch, recipe.seed, recipe.ema_decay, recipe.optimizer.clip_norm) == (4096, 0, 0, 5)
    tokens = recipe.token_expansion
    assert (tokens.steps, tokens.keep_rates, tokens.initial_keep_rate) == ((0, 100, 200), (0.6, 0.8, 1), 0.3)
