"""recipes/toe_deit.py: its authors' settings, and a debug run through all stages, killed in the middle of one."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import ranks
import timm
import torch
from board import Board
from safetensors.torch import load_file

from pipeline import backend
from pipeline.durations import make_schedule
from pipeline.models.build import make_model
from pipeline.models.stages import check_image_sizes
from pipeline.models.toe import TokenExpansion, TokenStages
from pipeline.prepare import prepare
from pipeline.recipe import Recipe, stages
from pipeline.recipe import TokenExpansion as TokenOptions
from pipeline.report.cost import cost_of
from pipeline.status import read_facts
from pipeline.telemetry.flops import FORWARDS_A_STEP, Flops, forward_flops
from pipeline.trainer import fit, leave
from pipeline.validate import validate
from recipes import toe_deit
from shards.errors import UserError
from tools import export

IMAGES, ASSUMED = 1_281_167, 8 * 312e12 * 0.4
PEAK = 0.01  # TFLOP/s
STEPS_AN_EPOCH, STEPS = 5, 14
BEGINS = (1, 2)  # epochs 0 on all tokens, 1 on half of them, 2 on three quarters
SIDES, MAGNITUDES = (16, 24, 32), (1, 2, 3)  # of efficienttrain, by epochs
THREE = r"([\d.]+), ([\d.]+) and ([\d.]+)"


@pytest.mark.parametrize("variant", toe_deit.VARIANTS)
@pytest.mark.parametrize("name", toe_deit.MODELS)
def test_is_built_at_full_size(name, variant):
    recipe = toe_deit.make(name, False, variant)
    validate(recipe)
    check_image_sizes(recipe)
    with torch.device("meta"):
        model = make_model(recipe, 1000)
        plain = timm.create_model(name)
    tokens = TokenStages.of(recipe.token_expansion, model, 1251)
    assert [*model.state_dict()] == [*plain.state_dict()]
    assert (tokens.expansion.num_prefix_tokens, tokens.expansion.stage) == (2 if "distilled" in name else 1, 1)


def test_stages_are_told_by_their_steps():
    recipe = toe_deit.make("deit_small_patch16_224", False)
    assert stages.parts(recipe, 1251, 0, 300 * 1251) == [(0, 125_100), (125_100, 125_100), (250_200, 125_100)]
    assert stages.parts(recipe, 1251, 125_099, 125_101) == [(125_099, 1), (125_100, 1)]
    both = toe_deit.make("deit_small_patch16_224", False, "efficienttrain")
    assert stages.begins(both) == (0, 100, 180, 200, 240)
    assert stages.parts(both, 10, 1900, 2100) == [(1900, 100), (2000, 100)]
    sections = [(begins, made.image_size, made.randaugment_magnitude) for begins, made in stages.augments(both)]
    assert sections == [(0, 160, 1), (60, 160, 3), (120, 160, 5), (180, 192, 7), (240, 224, 9)]
    assert stages.parts(Recipe(), 10, 3, 9) == [(3, 6)]


def test_the_learning_rate_is_within_what_the_docstring_says():
    """DeiT's: timm's cosine over all 300 epochs, which its program follows an epoch behind."""
    told = float(re.search(r"at most ([\d.]+) %", toe_deit.__doc__)[1]) / 100
    recipe = toe_deit.make("deit_small_patch16_224", False)
    per_epoch = IMAGES // recipe.data.global_batch
    schedule, durations = make_schedule(recipe, per_epoch)
    assert durations.total == 300 * per_epoch
    assert schedule(0) == 1e-6
    assert schedule(5 * per_epoch) == 1e-3
    theirs = {epoch: 1e-5 + (1e-3 - 1e-5) / 2 * (1 + math.cos(math.pi * (epoch - 1) / 300)) for epoch in range(6, 300)}
    apart = max(abs(schedule(epoch * per_epoch) - lr) for epoch, lr in theirs.items()) / 1e-3
    assert told - 0.001 < apart <= told


def test_hours_are_the_arithmetic_that_the_docstring_names():
    text = " ".join(toe_deit.__doc__.split())
    told = re.search(
        rf"would take {THREE} hours, and {THREE} on all tokens; by eff\S+ {THREE}, and {THREE} on all", text
    )
    assert told, text
    for variant, hours in zip(toe_deit.VARIANTS, (told.groups()[:6], told.groups()[6:]), strict=True):
        for model, less, more in zip(toe_deit.MODELS[:3], hours[:3], hours[3:], strict=True):
            staged = toe_deit.make(model, False, variant)
            whole = dataclasses.replace(staged, token_expansion=TokenOptions())
            for recipe, expected in ((staged, less), (whole, more)):
                flops = FORWARDS_A_STEP * Flops.of(recipe, 1000, batch=2).mean(0, 300)
                assert float(expected) == pytest.approx(flops * 300 * IMAGES / ASSUMED / 3600, abs=0.006)


def test_token_expansion_saves_what_the_reference_saves():
    for model in toe_deit.MODELS[:3]:
        recipe = toe_deit.make(model, False)
        saved = forward_flops(recipe, 1000, batch=2) / Flops.of(recipe, 1000, batch=2).mean(0, 300)
        assert 1.29 < saved < 1.33


def test_flops_of_stages():
    """As the reference counts them (without the selection, here less than 0.4 %): 7.29, 10.47, 13.74 G MACs a step."""
    flops = Flops.of(toe_deit.make("deit_small_patch16_224", False), 1000, batch=2)
    macs = [FORWARDS_A_STEP * flops.at(epoch) / 2e9 for epoch in (0, 99, 100, 199, 200, 299)]
    assert macs == pytest.approx([7.29, 7.29, 10.47, 10.47, 13.74, 13.74], rel=0.02)
    first, second, third = (flops.at(epoch) for epoch in (0, 100, 200))
    assert flops.mean(0, 100) == first
    assert flops.mean(50, 150) == pytest.approx((first + second) / 2)
    assert flops.mean(0, 300) == pytest.approx((first + second + third) / 3)
    assert flops.mean(300, 300) == third


def small(data: Path, run_dir: Path, variant: str = "deit", **changed: object) -> Recipe:
    """The debug form for three epochs on `data`; efficienttrain with a stage of images an epoch."""
    made = toe_deit.make("deit_tiny_patch16_224", True, variant)
    staged = dataclasses.replace(
        made.progressive, steps=(0, 1, 2), image_sizes=SIDES, randaugment_magnitudes=MAGNITUDES
    )
    return dataclasses.replace(
        made,
        run_dir=str(run_dir),
        data=dataclasses.replace(made.data, path=str(data), global_batch=16, workers=0),
        model=dataclasses.replace(made.model, embed_dim=48, depth=3, num_heads=3, patch_size=8),
        token_expansion=dataclasses.replace(made.token_expansion, steps=BEGINS, keep_rates=(0.5, 0.75)),
        progressive=staged if variant == "efficienttrain" else made.progressive,
        schedule=dataclasses.replace(made.schedule, length=f"{STEPS} steps", warmup="1 steps"),
        checkpoint=dataclasses.replace(made.checkpoint, every="4 steps", keep=9),
        evaluation=dataclasses.replace(made.evaluation, every="100%"),
        runtime=dataclasses.replace(made.runtime, log_every="1 steps", peak_tflops=PEAK),
        **changed,
    )


def train_each(data: Path, root: Path) -> None:
    """All at once, killed after step 8, in the middle of the first stage, and once more on recomputed activations."""
    torch.set_num_threads(1)
    world = backend.start("cpu")
    assert fit(small(data, root / "whole"), world) == "done"
    shutil.copytree(root / "whole", root / "resumed")
    shutil.rmtree(root / "resumed/checkpoints/step-00000012")
    shutil.rmtree(root / f"resumed/checkpoints/step-000000{STEPS}")
    assert fit(small(data, root / "resumed"), world) == "done"
    plain = small(data, root / "recomputed")
    recomputed = dataclasses.replace(plain.runtime, activation_checkpointing=1)
    assert fit(dataclasses.replace(plain, runtime=recomputed), world) == "done"
    fit(dataclasses.replace(small(data, root / "looked-at"), dry_run=True), world)
    leave(0)


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where the runs are, and what was printed."""
    root = tmp_path_factory.mktemp("toe")
    ended = ranks.run_function(train_each, (shards, root), root / "logs", 1).wait()
    assert ended.codes == [0], ended.outputs
    return root, ended.outputs[0]


@pytest.mark.parametrize("other", ["resumed", "recomputed"])
def test_a_run_that_is_killed_within_a_stage_or_recomputes_ends_with_the_same_weights(trained, other):
    for name in ("model", "ema"):
        whole, again = (load_file(trained[0] / run / f"weights/{name}.safetensors") for run in ("whole", other))
        torch.testing.assert_close(again, whole, rtol=0, atol=0)


def test_logged_mfu_follows_the_stages(trained, shards):
    lines = [line for line in ranks.metrics(trained[0] / "whole") if "loss" in line]
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
    flops = Flops.of(small(shards, trained[0]), 5, 16)
    assert [begins for begins, _ in flops.stages] == [0, *BEGINS]
    all_tokens, half, most = (value for _, value in flops.stages)
    assert half < most < all_tokens
    board = Board(trained[0] / "whole")
    speed, mfu = board.curve("train/images_per_second_per_gpu"), board.curve("train/mfu")
    found = {step: value / speed[step] * PEAK * 1e12 / FORWARDS_A_STEP for step, value in mfu.items()}
    expected = {step: (all_tokens, half, most)[(step - 1) // STEPS_AN_EPOCH] for step in range(1, STEPS + 1)}
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_page_counts_the_operations_that_were_made(trained, shards):
    cost = cost_of(read_facts(trained[0] / "whole"), None)
    flops = Flops.of(small(shards, trained[0]), 5, 2)
    total = sum(flops.at(step // STEPS_AN_EPOCH) for step in range(STEPS)) * 16 * FORWARDS_A_STEP
    assert cost.flops == pytest.approx(total, rel=1e-6)


def test_a_dry_run_measures_every_stage(trained):
    found = re.findall(r"(\d+) steps of [\d.]+ s, with images of (\d+) px, which come in [\d.]+ s", trained[1])
    assert found == [("5", "32"), ("5", "32"), ("4", "32")], trained[1]


def test_what_is_exported_is_the_plain_model(trained, tmp_path):
    assert export.main([str(trained[0] / "whole"), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["architecture"] == "deit_tiny_patch16_224"
    weights = load_file(trained[0] / "whole/weights/model.safetensors")
    plain = timm.create_model(
        "deit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=5
    )
    plain.load_state_dict(weights)


@pytest.mark.parametrize(
    ("length", "words"),
    [
        ("2 epochs", "the stage of epoch 2 would never begin, as schedule.length is '2 epochs', counted from 0"),
        ("10 steps", "the stage of epoch 2 would never begin, as schedule.length is 10 steps, 5 an epoch"),
    ],
)
def test_refuses_a_stage_that_never_begins(shards, alone, tmp_path, length, words):
    made = small(shards, tmp_path / "run")
    recipe = dataclasses.replace(made, schedule=dataclasses.replace(made.schedule, length=length))
    with pytest.raises(UserError) as caught:
        prepare(recipe, alone)
    assert words in str(caught.value)
    assert not [*tmp_path.glob("run/*")]


def test_refuses_what_it_cannot_do_with_the_other_errors_of_the_recipe(shards, tmp_path):
    made = small(shards, tmp_path / "run")
    section = dataclasses.replace(made.token_expansion, steps=(2, 1), keep_rates=(0.2,), repetitions=0)
    with pytest.raises(UserError) as caught:
        validate(dataclasses.replace(made, token_expansion=section, ema_decay=2.0))
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    assert [line.split()[1] for line in lines[1:]] == [
        "ema_decay",
        *(f"token_expansion.{name}" for name in ("steps", "steps", "initial_keep_rate", "repetitions")),
    ]


def test_without_stages_nothing_is_put_into_a_model():
    model = timm.create_model("resnet18")
    tokens = TokenStages.of(Recipe().token_expansion, model, 10)
    tokens(25)
    assert isinstance(tokens.expansion, TokenExpansion)
    assert not hasattr(model, "token_expansion")
