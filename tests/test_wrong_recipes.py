"""Wrong configurations, each with the message that refuses it before any work. Whole messages of recipes that parse are
in wrong_recipes.json."""

import dataclasses
import json
from pathlib import Path

import pytest

from pipeline.prepare import prepare
from pipeline.recipe import parse
from recipes import finetune_1k
from shards.errors import UserError

COMMAND_LINES = [
    ("--recpie x.yaml", "error: --recpie is no option; the nearest is --recipe"),
    ("--model vittm_bse", "argument --model: invalid choice: 'vittm_bse' (choose from 'vittm_base', 'vittm_small',"),
    ("--variant shampo", "argument --variant: invalid choice: 'shampo' (choose from 'adamw', 'shampoo', 'authors',"),
    ("--data.globl-batch 8", "--data.global-batch"),
    ("--data.global-batch many", "invalid literal for int() with base 10: 'many'"),
    ("--loss mse", "invalid choice 'mse'"),
    ("--augment.crop-scale 0.5", "--augment.crop-scale"),
]
RECIPES = json.loads((Path(__file__).parent / "wrong_recipes.json").read_text())


def parsed(words: list[str], small: list[str]):
    """With the words over `small`, of which a baseline takes no patches of ViTTM."""
    baseline = "--model" in words and words[words.index("--model") + 1].startswith("vit_")
    pairs = zip(small[::2], small[1::2], strict=True)
    kept = [word for pair in pairs for word in pair if not (baseline and pair[0].endswith("-ps"))]
    return parse(finetune_1k.make, finetune_1k.MODELS, "", ["--debug", *kept, *words], finetune_1k.VARIANTS)


@pytest.mark.parametrize(("options", "message"), COMMAND_LINES, ids=lambda value: value[:40])
def test_a_wrong_command_line(options, message, small, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parsed(options.split(), small)
    assert exit_info.value.code == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert message in " ".join(found.err.replace("│", " ").split())


@pytest.mark.parametrize("wrong", RECIPES, ids=lambda wrong: " ".join(wrong["options"]))
def test_a_wrong_recipe(wrong, small, shards, alone, tmp_path):
    recipe = parsed(["--run-dir", str(tmp_path / "run"), *wrong["options"]], small)
    with pytest.raises(UserError) as error:
        prepare(recipe, dataclasses.replace(alone, strategy=wrong.get("strategy", "ddp")))
    assert str(error.value) == wrong["message"].replace("DATA", str(shards))
    assert not [*tmp_path.glob("run/*")], "nothing is written before the error"


def test_there_are_more_than_thirty():
    assert len(RECIPES) + len(COMMAND_LINES) > 50
    assert len({wrong["message"] for wrong in RECIPES}) == len(RECIPES)
