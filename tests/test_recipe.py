"""Recipes: the authors' numbers, the command line, durations, and what is refused."""

import dataclasses

import pytest

from pipeline import chain
from pipeline.recipe import Augment, Checkpoint, Data, Evaluation, Recipe, Schedule, flatten, parse
from pipeline.validate import num_steps, validate
from recipes import chain as chain_recipe
from recipes import demo, finetune_1k, pretrain_21k
from shards.errors import UserError

PATCHES = {
    "augment.image_size": 224,
    "model.memory_ps": 28,
    "model.process_ps": 28,
    "model.rw_head_type": "lin",
    "model.latent_size_scale": 4,
    "model.fusion_type": "residual",
    "model.process_embedder_type": "patch",
    "optimizer.betas": [0.9, 0.999],
    "optimizer.eps": 1e-8,
    "optimizer.clip_norm": 1.0,
    "schedule.length": "300 epochs",
    "schedule.warmup_lr": 1e-6,
    "ema_decay": 0.999,
}
PRETRAIN = PATCHES | {
    "data.global_batch": 4096,
    "schedule.warmup": "10000 steps",
    "schedule.lr": 1.5e-4,
    "schedule.min_lr": 1e-7,
    "optimizer.weight_decay": 0.03,
    "augment.randaugment_ops": 2,
    "augment.randaugment_magnitude": 15,
    "augment.mixup": True,
    "augment.cutmix": False,
    "augment.mixup_alpha": 0.5,
    "augment.cutmix_alpha": 0.5,
    "augment.erasing": 0.0,
    "loss": "ce",
    "model.drop_path_rate": 0.0,
}
FINETUNE_SMALL = PRETRAIN | {
    "schedule.warmup": "3000 steps",
    "schedule.lr": 1.75e-4,
    "schedule.min_lr": 1e-6,
    "augment.cutmix": True,
    "augment.erasing": 0.25,
    "loss": "bce",
    "model.drop_path_rate": 0.1,
}
FINETUNE_BASE = FINETUNE_SMALL | {
    "data.global_batch": 2048,
    "schedule.lr": 0.25e-4,
    "schedule.min_lr": 1e-7,
    "optimizer.weight_decay": 0.1,
    "augment.randaugment_ops": 3,
    "augment.randaugment_magnitude": 20,
    "augment.mixup_alpha": 0.8,
    "augment.cutmix_alpha": 0.8,
    "model.drop_path_rate": 0.2,
}


OF_VITTM = {name for name in PATCHES if name.startswith("model.")}


@pytest.mark.parametrize("model", pretrain_21k.MODELS)
def test_recipes_have_the_numbers_of_the_authors_table(model):
    finetune = FINETUNE_BASE if "_base" in model else FINETUNE_SMALL
    for module, table in ((pretrain_21k, PRETRAIN), (finetune_1k, finetune)):
        fields = flatten(module.make(model, False))
        expected = {
            name: value for name, value in table.items() if model not in pretrain_21k.BASELINES or name not in OF_VITTM
        }
        assert {name: fields[name] for name in expected} == expected
        assert fields["model.name"] == model


def test_the_chain_is_made_of_both_recipes():
    both = chain_recipe.make("vittm_small", False)
    for found, module in ((both.pretrain, pretrain_21k), (both.finetune, finetune_1k)):
        assert dataclasses.replace(found, run_dir="") == dataclasses.replace(
            module.make("vittm_small", False), run_dir=""
        )


def test_the_chain_evaluates_where_and_how_fine_tuning_reads():
    """What is given for the evaluation goes over it; of other data the split is its own."""
    options = ["--finetune.data.val", "minival", "--finetune.data.cache", "/scratch", "--finetune.data.remote", "range"]

    def asked(*more: str) -> chain.Evaluating:
        made = parse(chain_recipe.make, pretrain_21k.MODELS, "", [*options, *more])
        return next(stage.options for stage in chain_recipe.stages(made) if stage.kind == "evaluate")

    data = chain_recipe.make("vittm_base", False).finetune.data
    own = chain.Evaluating(data.path, "minival", remote="range", cache="/scratch", cache_size=data.cache_size)
    assert asked() == own
    assert asked("--evaluate.split", "val", "--evaluate.batch", "8") == dataclasses.replace(own, split="val", batch=8)
    other = asked("--evaluate.data", "s3://there/v2", "--evaluate.cache", "here")
    assert other == dataclasses.replace(own, data="s3://there/v2", split="", cache="here")


def test_every_recipe_and_debug_form_is_valid():
    for small in (False, True):
        for model in pretrain_21k.MODELS:
            validate(pretrain_21k.make(model, small))
            validate(finetune_1k.make(model, small))
        for stage in demo.stages(demo.make(demo.MODEL, small)):
            validate(stage.recipe)


def test_a_control_of_the_demo_differs_in_its_start_alone():
    stages = {stage.name: stage for stage in demo.stages(demo.make(demo.MODEL, False))}
    assert len(stages) == 9
    for prefix in ("", "few0_", "few1_", "few2_"):
        pretrained, scratch = stages[f"{prefix}chain"], stages[f"{prefix}scratch"]
        assert (pretrained.start_from, scratch.start_from) == ("pretrain", "")
        assert dataclasses.replace(pretrained.recipe, run_dir="") == dataclasses.replace(scratch.recipe, run_dir="")


def test_the_command_line_overrides_any_field():
    recipe = parse(
        pretrain_21k.make,
        pretrain_21k.MODELS,
        "",
        ["--model", "vittm_small", "--seed", "3", "--augment.crop-scale", "0.2", "0.9", "--augment.no-mixup"],
    )
    expected = pretrain_21k.make("vittm_small", False)
    augment = dataclasses.replace(expected.augment, crop_scale=(0.2, 0.9), mixup=False)
    assert recipe == dataclasses.replace(expected, seed=3, augment=augment)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.globl-batch", "8"], "--data.global-batch"),
        (["--data.global-batch", "many"], "invalid literal for int"),
        (["--loss", "mse"], "ce"),
        (["--model", "vittm_huge"], "vittm_base"),
        (["--recpie", "x.yaml"], "error: --recpie is no option; the nearest is --recipe"),
    ],
)
def test_a_wrong_option_names_the_good_one(options, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse(pretrain_21k.make, pretrain_21k.MODELS, "", options)
    assert exit_info.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse(finetune_1k.make, finetune_1k.MODELS, finetune_1k.__doc__, ["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert "hyper-parameters of its authors" in text
    for name in flatten(finetune_1k.make("vittm_base", False)):
        assert "--" + name.replace("_", "-") in text


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        *[("3 epochs", 30), ("1 epoch", 10), ("0.5 epochs", 5), ("7 steps", 7), ("2%", 4), ("0%", 0)],
        *[("1e9 images", 244141), ("4096 images", 1), ("6143 images", 1), ("6145 images", 2), ("1 image", 0)],
    ],
)
def test_durations(duration, steps):
    assert num_steps(duration, batches_per_epoch=10, global_batch=4096, total=200) == steps


@pytest.mark.parametrize("duration", ["10", "ten steps", "5 hours", "-1 steps", "%", "inf steps", "nan epochs"])
def test_what_is_no_duration(duration):
    with pytest.raises(UserError, match="is no duration: it takes a number, 0 or more, and a unit, as '300 epochs'"):
        num_steps(duration, 10, 8)


def test_everything_wrong_is_listed_together():
    recipe = Recipe(
        data=Data(global_batch=0, workers=-1),
        label_smoothing=1.0,
        augment=Augment(crop_scale=(0.5, 0.1), mixup=True, mixup_alpha=0.0, cutmix=True, cutmix_alpha=0.0, hflip=1.5),
        evaluation=Evaluation(crop_pct=0.0),
        schedule=Schedule(length="50%", warmup="soon"),
        checkpoint=Checkpoint(every="0 steps"),
    )
    with pytest.raises(UserError) as error:
        validate(recipe)
    lines = str(error.value).splitlines()
    assert lines[0] == "the recipe cannot run:"
    assert [line.split()[1].rstrip(":") for line in lines[1:]] == [
        "schedule.length",
        "schedule.warmup",
        "checkpoint.every",
        "data.global_batch",
        "augment.hflip",
        "data.workers",
        "augment.crop_scale",
        "label_smoothing",
        "evaluation.crop_pct",
        "augment.mixup_alpha",
        "augment.cutmix_alpha",
    ]
